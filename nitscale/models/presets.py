"""The published models, one row each: `preset("nit-xl")` is a `ModelConfig`, `preset("nit-xl", depth=9)` changes it.

The architectures are those of the published configurations, parameter for parameter; positions and time are ours
(docs/fidelity.md). Weights published for them are read by `nitscale.models.reference`.
"""

import difflib
from dataclasses import replace
from typing import Any

from nitscale.errors import UserError
from nitscale.models.transformer import ModelConfig


def _nit(width: int, depth: int, heads: int, feature_block: int, adaln_rank: int = 0) -> ModelConfig:
    """NiT (arXiv 2506.03131 table 1): DC-AE latents f32c32, patch 1, affine QK-norm."""
    adaln = "lora" if adaln_rank else "full"
    return ModelConfig(
        width=width, depth=depth, heads=heads, feature_block=feature_block, adaln=adaln, adaln_rank=adaln_rank
    )


def _fit(width: int, depth: int, heads: int, **changes: Any) -> ModelConfig:
    """FiTv2 (arXiv 2410.13925 table 2): SD-VAE latents f8c4, patch 2, SwiGLU, low-rank and global AdaLN, plain QK-norm;
    trained at up to 16 x 16 tokens."""
    fitv2 = ModelConfig(
        patch_size=2,
        in_channels=4,
        width=width,
        depth=depth,
        heads=heads,
        mlp="swiglu",
        mlp_width=width * 8 // 3,
        adaln="lora+global",
        adaln_rank=width // 4,
        qk_norm="plain",
        qk_norm_eps=1e-6,
        rope_train_grid=16,
        published_as="fit",
    )
    return replace(fitv2, **changes)


HIGH_RESOLUTION = {"rope_extrapolation": "ntk", "rope_decoupled": True}
"""FiTv2's post-training at up to 1024 tokens: VisionNTK, each image by its own size."""

PRESETS = {
    "nit-s": _nit(384, 12, 6, feature_block=4),
    "nit-b": _nit(768, 12, 12, feature_block=4),
    "nit-l": _nit(1024, 24, 16, feature_block=6),
    "nit-xl": _nit(1152, 28, 16, feature_block=8),
    "nit-xxl": _nit(1536, 40, 24, feature_block=8, adaln_rank=512),
    "fitv2-b": _fit(768, 15, 12),
    "fitv2-xl": _fit(1152, 36, 16),
    "fitv2-3b": _fit(2304, 40, 24),
    "fitv2-b-hr": _fit(768, 15, 12, **HIGH_RESOLUTION),
    "fitv2-xl-hr": _fit(1152, 36, 16, **HIGH_RESOLUTION),
    "fitv2-3b-hr": _fit(2304, 40, 24, **HIGH_RESOLUTION),
    # FiT (arXiv 2402.12376): full AdaLN, SwiGLU of 4 D, no QK-norm, trained to predict noise and its variance
    "fit-xl": _fit(
        1152,
        28,
        16,
        mlp_width=4608,
        adaln="full",
        adaln_rank=0,
        qk_norm="none",
        prediction="noise",
        learned_variance=True,
        time_scale=1000.0,
    ),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The configuration of a published model, with these fields changed. UserError for an unknown name."""
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"model: preset {name!r} is unknown{hint}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
