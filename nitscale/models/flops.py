"""Floating-point operations of a model on a pack, for the model FLOPs utilisation that training reports."""

from collections.abc import Iterable

from nitscale.models.transformer import FREQUENCIES, ModelConfig


def forward_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Operations of a forward pass over images of these lengths (tokens), a multiply-add counted as two. Attention
    counts Σ nᵢ² and not the pack's square; modulation counts once an image. Norms and activations are left out."""
    lengths = [int(length) for length in lengths]
    tokens, images, pairs = sum(lengths), len(lengths), sum(length * length for length in lengths)
    width = config.width
    mlp = (3 if config.mlp == "swiglu" else 2) * width * config.hidden_width
    rank = config.adaln_rank
    adaln = {
        "full": 6 * width * width,
        "lora": 7 * width * rank,
        "lora+global": 7 * width * rank,
        "swiglu": 8 * width * 3 * (width // 4),
    }[config.adaln]
    of_token = config.depth * (4 * width * width + mlp) + (config.token_features + config.output_features) * width
    of_image = config.depth * adaln + (FREQUENCIES + width) * width + 2 * width * width
    if config.adaln == "lora+global":
        of_image += 6 * width * width
    return 2.0 * (tokens * of_token + images * of_image + config.depth * 2 * pairs * width)


def training_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Forward and backward: three times the forward. Recomputed activations are not counted."""
    return 3.0 * forward_flops(config, lengths)
