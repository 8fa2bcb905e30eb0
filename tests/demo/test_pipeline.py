"""The demo from end to end at the smallest size, on two ranks, interrupted and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from nitscale.checkpoints import published
from nitscale.demo import judge, pipeline
from nitscale.demo.pipeline import DemoConfig, run_demo
from nitscale.demo.ranks import run_ranks
from nitscale.errors import UserError
from nitscale.flow.sampling import SamplerConfig

SMALL = {
    "pipeline.PICTURES": 48,
    "pipeline.HELD_OUT": 24,
    "pipeline.MOST_STEPS": 120,
    "pipeline.CALIBRATION_STEPS": 4,
    "pipeline.CALIBRATION_STARTS": 2,
    "pipeline.MOST_RANKS": 2,
    "judge.SIZES": {"trained": [(64, 64)], "unseen": [(64, 192)], "beyond": [(96, 288)]},
    "judge.IMAGES_A_CLASS": {"trained": 2, "unseen": 1, "beyond": 1},
    "judge.SAMPLER": SamplerConfig(steps=2),
}
"""What makes the demo small, by module and name."""
SCRIPT = """
import sys
from nitscale.cli import main
from nitscale.demo import judge, pipeline
from nitscale.flow.sampling import SamplerConfig
{settings}
sys.argv[1:] = ["demo", "--out", {folder!r}]
main()
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo that Ctrl-C reached in the middle of its training."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    settings = "\n".join(f"{name} = {value!r}" for name, value in SMALL.items())
    script = SCRIPT.format(settings=settings, folder=str(folder))
    demo = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    metrics = folder / "train" / "metrics.jsonl"
    while demo.poll() is None and not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(demo.pid, signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1, output
    assert "nothing is lost; the same command goes on from here" in output
    return folder


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_ends_with_a_report(interrupted, monkeypatch, capsys):
    (stopped,) = published(interrupted / "train" / "checkpoints")
    assert 20 <= stopped.step < 120
    shards = {p: p.stat().st_mtime_ns for p in interrupted.glob("*/shards/*.tar")}
    assert shards
    for name, value in SMALL.items():
        monkeypatch.setattr(f"nitscale.demo.{name}", value)
    run_demo(DemoConfig(interrupted))
    assert {p: p.stat().st_mtime_ns for p in interrupted.glob("*/shards/*.tar")} == shards
    assert published(interrupted / "train" / "checkpoints")[-1].step == 120
    report = json.loads((interrupted / "report.json").read_text())
    named = (
        "agreement_trained agreement_unseen classifier_on_real frechet_samples frechet_noise seconds machine versions"
    )
    assert set(named.split()) <= report.keys()
    assert report["classifier_on_real"] >= 0.97 and 0 <= report["agreement_trained"] <= 1
    assert report["seconds"] > 0 and report["versions"]["torch"]
    with Image.open(interrupted / "contact_sheet.png") as sheet:
        assert sheet.width > 8 * 64 and sheet.height > 500
    page = (interrupted / "report.html").read_text()
    assert page.count("data:image/") == 2 and "http" not in page.replace("http://www.w3.org", "")
    assert "class agreement" in capsys.readouterr().out

    with pytest.raises(UserError, match=r"begun with --minutes 9\.0"):
        run_demo(DemoConfig(interrupted, minutes=30))


def test_two_demos_at_once_in_one_folder_are_refused(tmp_path):
    from nitscale.files import exclusive_lock

    with exclusive_lock(tmp_path / ".lock", "running"), pytest.raises(UserError, match="already"):
        run_demo(DemoConfig(tmp_path))


def test_a_failed_rank_ends_the_others_and_its_words_are_passed_on(tmp_path):
    with pytest.raises(UserError, match=r"a training process failed: error: config: no file"):
        run_ranks(["train", str(tmp_path / "absent.yaml")], ranks=2, quiet=True)


def test_own_photos_are_split_by_class_and_every_tenth_is_held_out(tmp_path):
    for name, count in {"cats": 20, "dogs": 9}.items():
        for i in range(count):
            path = tmp_path / "photos" / name / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (i, 0, 0)).save(path)
    demo = DemoConfig(tmp_path / "out", tmp_path / "photos")
    for _ in range(2):
        pipeline.prepare_images(demo)
        counts = {
            f.name: len(list((tmp_path / "out" / f).rglob("*.png"))) for f in (Path("images"), Path("heldout_images"))
        }
        assert counts == {"images": 27, "heldout_images": 2}


def test_samples_of_own_photos_use_sizes_that_occur_and_some_that_do_not(shapes_dataset):
    from nitscale.data.manifest import load_dataset

    dataset = load_dataset(shapes_dataset)
    sizes = judge.own_sizes(dataset, 16)
    grids = {tuple(int(side) * 16 for side in name.split("x")) for name in dataset.manifest.grids}
    assert set(sizes["trained"]) <= grids and not set(sizes["unseen"]) & grids
