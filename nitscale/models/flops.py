"""Arithmetic of one training step, counted as useful work: two operations a multiply-add, nothing for recomputation.

Attention costs Σ nᵢ² over the images of a pack and not the square of the pack's length; AdaLN is per image.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

from nitscale.models.transformer import ModelConfig, PackedTransformer


def forward_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Operations of one forward over images of these numbers of tokens."""
    lengths = [int(length) for length in lengths]
    per_token, per_image = linear_parameters(config)
    squares = sum(length * length for length in lengths)
    attention = 4 * config.width * config.depth * squares
    return 2.0 * per_token * sum(lengths) + 2.0 * per_image * len(lengths) + attention


def training_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Operations of forward and backward: three times the forward's."""
    return 3 * forward_flops(config, lengths)


@cache
def linear_parameters(config: ModelConfig) -> tuple[int, int]:
    """Weights of the linears that act on (each token, each image)."""
    with torch.device("meta"):
        model = PackedTransformer(config)
    per_token = per_image = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if "adaln" in name or name.startswith("time_embedding"):
                per_image += module.weight.numel()
            else:
                per_token += module.weight.numel()
    return per_token, per_image
