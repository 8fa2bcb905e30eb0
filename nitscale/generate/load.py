"""A trained model for sampling: the averaged weights of a checkpoint and the codec of the data it was trained on."""

from dataclasses import dataclass
from pathlib import Path

import torch

from nitscale.autoencoders import Codec
from nitscale.config import load_config
from nitscale.data.manifest import load_dataset
from nitscale.models.transformer import PackedTransformer
from nitscale.train.checkpoint import find_checkpoint
from nitscale.train.config import RunConfig


@dataclass(frozen=True)
class TrainedModel:
    model: PackedTransformer
    codec: Codec
    classes: list[str]
    step: int
    config: RunConfig
    device: torch.device


def load_trained(path: Path, device: torch.device | str = "cpu") -> TrainedModel:
    """The averaged model of a checkpoint, or of the newest one of a run folder, verified before use.

    UserError if there is none, a file is damaged, or the data set with the codec is gone.
    """
    checkpoint = find_checkpoint(path)
    checkpoint.verify()
    config = load_config(RunConfig, checkpoint.folder / "config.yaml")
    dataset = load_dataset(config.data.path)
    model = PackedTransformer(config.model)
    model.load_state_dict(checkpoint.ema())
    model.to(device).eval()
    codec = dataset.codec().to(device)
    return TrainedModel(model, codec, dataset.manifest.classes, checkpoint.step, config, torch.device(device))
