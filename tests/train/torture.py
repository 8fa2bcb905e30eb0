"""Kill -9 of a random rank, at random moments of a training on two ranks, and the same command again.

    python -m tests.train.torture --kills 20 --seed 0

Half of the kills come while a checkpoint is being written. In the end the run must equal an undisturbed one bit for
bit; after every kill the newest checkpoint must be whole and none may have been lost.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NITSCALE_DEVICE"] = "cpu"

from nitscale.checkpoints import newest_whole, published
from nitscale.config import to_yaml
from tests.train.tiny import differences, final_state, tiny_run

STEPS_A_KILL = 15
ROOT = Path(__file__).parents[2]


def torture(dataset: Path, folder: Path, kills: int, seed: int) -> list[str]:
    """What was done, a line for each kill. AssertionError if something is lost or differs."""
    options = ("train.checkpoint_every=3", f"train.steps={STEPS_A_KILL * (kills + 1)}", "train.keep_last=3")
    runs = {name: folder / name for name in ("undisturbed", "tortured")}
    for name, run in runs.items():
        (folder / f"{name}.yaml").write_text(to_yaml(tiny_run(run, dataset, *options)))
    undisturbed = subprocess.run(command(folder / "undisturbed.yaml"), cwd=ROOT, capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    choose = random.Random(seed)
    report = []
    for number in range(kills):
        rank, in_save = choose.randrange(2), number % 2 == 1
        after, delay = choose.randrange(2, STEPS_A_KILL), choose.uniform(0, 0.1)
        before = newest_step(runs["tortured"])
        launcher = subprocess.Popen(
            command(folder / "tortured.yaml"),
            cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"),
        )  # fmt: skip
        wait_for_moment(launcher, runs["tortured"], before + after, in_save)
        time.sleep(0 if in_save else delay)
        staging = [path.name for path in (runs["tortured"] / "checkpoints").glob(".staging-*")]
        os.kill(children(launcher.pid)[rank], signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0
        assert not processes_of_session(launcher.pid), "orphans"
        newest = newest_whole(runs["tortured"] / "checkpoints")
        now = newest.step if newest else 0
        assert now >= before, f"step {before} was published, now the newest is {now}"
        report.append(
            f"kill {number + 1}: rank {rank}, {'in save ' + str(staging) if in_save else 'in step'}, at {now}"
        )
        print(report[-1], flush=True)
    finished = subprocess.run(command(folder / "tortured.yaml"), cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert differences(final_state(runs["undisturbed"]), final_state(runs["tortured"])) == []
    return report


def command(config: Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "-m", "nitscale", "train", str(config)]


def newest_step(run: Path) -> int:
    found = published(run / "checkpoints")
    return int(found[-1].folder.name.removeprefix("step-")) if found else 0


def wait_for_moment(launcher: subprocess.Popen[bytes], run: Path, step: int, in_save: bool) -> None:
    """Return when the run has done `step`, and, if asked, is writing a checkpoint."""
    lines = run / "metrics.jsonl"
    while launcher.poll() is None:
        done = lines.exists() and lines.read_text().count("\n") >= step
        if done and (not in_save or list((run / "checkpoints").glob(".staging-*"))):
            return
        time.sleep(0.001)
    raise AssertionError(f"the run ended by itself: {Path(run.parent, 'log').read_text()[-3000:]}")


def children(pid: int) -> list[int]:
    """Processes that a process started, in their order."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def processes_of_session(session: int) -> list[int]:
    """What still runs of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from data_prep.encode import encode_folder
    from data_prep.pipeline import EncodeConfig
    from nitscale.demo.shapes import draw_folder

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_folder(folder / "images", 64, (32, 79), 2.0, "tests")
        encode_folder(folder / "images", folder / "latents", EncodeConfig(shard_samples=16), progress=False)
        torture(folder / "latents", folder, options.kills, options.seed)
    print("the final weights, moments, averages and cursors equal the undisturbed run's bit for bit")


if __name__ == "__main__":
    main()
