"""Two processes: exact resume under ZeRO 1 and 2, and failures of one that end both."""

import os
import subprocess
import sys
from pathlib import Path

from nitscale.checkpoints import published
from nitscale.train.loop import run_training
from nitscale.train.process import start_process
from tests.train.tiny import metrics, tiny_run


def torchrun(module: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run a module of the tests on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NITSCALE_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_two_ranks_resume_exactly_stop_together_and_fail_together(shapes_dataset: Path, tmp_path: Path) -> None:
    run = torchrun("tests.train.two_ranks", shapes_dataset, tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    assert (tmp_path / "passed").read_text() == "all cases"


def test_a_run_of_which_a_rank_was_killed_goes_on_alone_with_the_same_data(
    shapes_dataset: Path, tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = torchrun("tests.train.killed_rank", shapes_dataset, killed)
    assert "SIGKILL" in run.stdout + run.stderr
    assert [c.step for c in published(killed / "checkpoints")] == [4]
    assert run_training(tiny_run(killed, shapes_dataset, "engine.zero_stage=0"), start_process())
    assert run_training(tiny_run(whole, shapes_dataset), start_process())
    assert metrics(killed)[-1]["data_digest"] == metrics(whole)[-1]["data_digest"]
