"""A trained model for sampling: the averaged weights of a checkpoint, its classes, and the codec of its data."""

from dataclasses import dataclass
from pathlib import Path

import torch

from nitscale.autoencoders import Codec, codec_from_spec
from nitscale.checkpoints import find_weights
from nitscale.config import build
from nitscale.models.transformer import ModelConfig, PackedTransformer


@dataclass(frozen=True)
class TrainedModel:
    model: PackedTransformer
    codec: Codec
    classes: list[str]
    step: int
    device: torch.device


def load_trained(path: Path, device: torch.device | str = "cpu") -> TrainedModel:
    """The averaged model of a checkpoint, or of the newest one of a run folder, verified before use.

    UserError if there is none, a file is damaged, or this build does not have the codec.
    """
    checkpoint = find_weights(path)
    about = checkpoint.model()
    codec = codec_from_spec(about["codec"])
    with torch.device("meta"):
        model = PackedTransformer(build(ModelConfig, about["model"], "model", {}))
    model.load_state_dict(checkpoint.weights(), assign=True)
    model.to(device).eval()
    return TrainedModel(model, codec.to(device), about["classes"], checkpoint.step, torch.device(device))
