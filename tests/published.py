"""Numbers of the published code, `tests/goldens`, or the folder named by NITSCALE_GOLDENS."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nitscale.layout import PackLayout
from nitscale.models.reference import load_reference
from nitscale.models.transformer import PackedTransformer

FOLDER = Path(os.environ.get("NITSCALE_GOLDENS", Path(__file__).parent / "goldens"))


def names(pattern: str) -> list[str]:
    """The fixtures whose name fits, without their ending."""
    return sorted(path.stem for path in FOLDER.glob(pattern + ".safetensors"))


@cache
def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the fixture says of itself, and its tensors."""
    tensors = FOLDER / f"{name}.safetensors"
    return json.loads((FOLDER / f"{name}.json").read_text()), load_file(tensors) if tensors.exists() else {}


def published_model(family: str, name: str, dtype: torch.dtype, **changes: Any) -> PackedTransformer:
    """The model of a fixture's configuration and weights."""
    about, tensors = golden(name)
    weights = {key.removeprefix("weights."): value.to(dtype) for key, value in tensors.items() if "weights." in key}
    return load_reference(family, {**about["config"], **changes}, weights)


def nit_layout(tensors: dict[str, Tensor]) -> PackLayout:
    return PackLayout.from_grids(tensors["in.hw_list"].tolist())


def fit_layout(sizes: Tensor) -> PackLayout:
    """The pack of a padded batch with sizes (B, 1, 2)."""
    return PackLayout.from_grids(sizes[:, 0].tolist())


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    actual = actual.detach().double().reshape(expected.shape)
    return float((actual - expected).abs().max() / expected.abs().max())


def norms(gradients: dict[str, Tensor], order: list[str]) -> Tensor:
    """L2 norms in this order; NaN where there is no gradient."""
    return torch.tensor([float(gradients[key].double().norm()) if key in gradients else float("nan") for key in order])


TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}
"""Largest difference from the stored float64, whose time embedding and rotation angles are float32 themselves."""
