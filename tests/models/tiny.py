"""Small models with weights at random."""

from typing import Any

import torch

from nitscale.models.transformer import ModelConfig, PackedTransformer

NIT = {"in_channels": 4, "width": 32, "depth": 3, "heads": 2, "num_classes": 5}
FITV2 = {
    **NIT,
    "patch_size": 2,
    "mlp": "swiglu",
    "mlp_width": 40,
    "adaln": "lora+global",
    "adaln_rank": 6,
    "qk_norm": "plain",
    "rope_train_grid": 2,
    "rope_extrapolation": "ntk",
    "rope_magnitude": "attention_scale",
}
FIT = {**NIT, "mlp": "swiglu", "qk_norm": "none", "rope_extrapolation": "yarn", "rope_train_grid": 2}
DEMO = {**NIT, "mlp": "swiglu", "absolute_positions": "fractional"}
CONFIGS = {"nit": NIT, "fitv2": FITV2, "fit": FIT, "demo": DEMO}


def random_model(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> PackedTransformer:
    """A model none of whose weights is zero, so that every part of it shows in the output."""
    model = PackedTransformer(ModelConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("_norm.weight") else 0.0
            parameter.normal_(centre, 0.05, generator=generator)
    return model.to(dtype)
