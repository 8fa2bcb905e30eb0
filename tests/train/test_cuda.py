"""Training on a GPU, where there is one: the same data as on a CPU, finite losses, and samples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nitscale.config import to_yaml
from tests.train.tiny import metrics, tiny_run


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_on_the_same_data_and_its_checkpoint_is_sampled(
    trained_run: Path, shapes_dataset: Path, tmp_path: Path, precision: str
) -> None:
    config = tiny_run(tmp_path / "run", shapes_dataset, f"engine.precision={precision}", "model.heads=1")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    environment = {name: value for name, value in os.environ.items() if name != "NITSCALE_DEVICE"}
    for arguments in (
        ["train", str(tmp_path / "run.yaml")],
        ["sample", str(tmp_path / "run"), "--size", "32x64", "--steps", "4", "--out", str(tmp_path / "samples")],
    ):
        command = [sys.executable, "-m", "nitscale", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr
    on_gpu, on_cpu = metrics(tmp_path / "run"), metrics(trained_run)
    assert [line["data_digest"] for line in on_gpu] == [line["data_digest"] for line in on_cpu]
    assert all(0.5 < line["loss"] < 5 for line in on_gpu)
    assert len(list((tmp_path / "samples").glob("class*.png"))) == 8
