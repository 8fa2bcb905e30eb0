"""What several tests share: a tiny data set of drawn pictures, made once."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NITSCALE_DEVICE"] = "cpu"  # bit-for-bit comparisons, and two ranks on machines with one GPU or none

import pytest
import torch

from data_prep.encode import encode_folder
from data_prep.pipeline import EncodeConfig
from nitscale.demo.shapes import draw_folder
from nitscale.train.loop import run_training
from nitscale.train.process import start_process
from tests.train.tiny import tiny_run

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 64 pictures of eight classes, 32 to 79 pixels a side, in 4 shards; f16c32 DCT latents."""
    folder = tmp_path_factory.mktemp("shapes")
    draw_folder(folder / "images", 64, (32, 79), 2.0, "tests")
    encode_folder(folder / "images", folder / "latents", EncodeConfig(shard_samples=16), progress=False)
    return folder / "latents"


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, shapes_dataset: Path) -> Path:
    """The folder of a finished run of a tiny model on `shapes_dataset`."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_training(tiny_run(folder, shapes_dataset), start_process())
    return folder
