"""What several tests share: a tiny data set of drawn pictures, made once."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from data_prep.encode import encode_folder
from data_prep.pipeline import EncodeConfig
from nitscale.demo.shapes import draw_folder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 64 pictures of eight classes, 32 to 79 pixels a side, in 4 shards; f16c32 DCT latents."""
    folder = tmp_path_factory.mktemp("shapes")
    draw_folder(folder / "images", 64, (32, 79), 2.0, "tests")
    encode_folder(folder / "images", folder / "latents", EncodeConfig(shard_samples=16), progress=False)
    return folder / "latents"
