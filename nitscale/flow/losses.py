"""Losses of a pack: predictions and targets (N, F) in, a scalar out.

Every loss is an average over tokens: `per="token"` weighs each token alike, and so an image by its area (NiT); `per=
"image"` averages within each image first (FiT). `weights` (n,) weigh images; 0 leaves one out. `total` is what the
weighted sum is divided by, Σ weight · tokens or Σ weight over the whole step: with it, packs of a step and ranks add
up to the step's loss without knowing of each other; by default it is this pack's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nitscale.errors import UserError
from nitscale.flow.paths import per_token
from nitscale.layout import PackLayout


def velocity_loss(
    prediction: Tensor,
    target: Tensor,
    layout: PackLayout,
    weights: Tensor | None = None,
    total: float | None = None,
    per: str = "token",
) -> Tensor:
    """The mean squared error. Noise prediction is trained by it as well."""
    return reduce_tokens(squared_error(prediction, target), layout, weights, total, per)


def directional_loss(
    prediction: Tensor,
    target: Tensor,
    layout: PackLayout,
    weights: Tensor | None = None,
    total: float | None = None,
    per: str = "token",
) -> Tensor:
    """The mean of 1 - cos between prediction and target. The published NiT trainer adds it to the velocity loss."""
    return reduce_tokens(direction_error(prediction, target), layout, weights, total, per)


def repa_loss(
    projected: Tensor,
    features: Tensor,
    layout: PackLayout,
    weights: Tensor | None = None,
    total: float | None = None,
    per: str = "token",
) -> Tensor:
    """The mean of 1 - cos between the model's projected features and an encoder's, both (N, Z): representation
    alignment, arXiv 2410.06940 eq. 8."""
    return reduce_tokens(alignment_error(projected, features), layout, weights, total, per)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(N, F) → (N,): the squared error's mean over a token's features."""
    return (prediction - target).square().mean(-1)


def direction_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(N, F) → (N,): 1 - cosine of the angle between prediction and target in a token's features."""
    return 1 - F.cosine_similarity(prediction, target, dim=-1)


def alignment_error(projected: Tensor, features: Tensor) -> Tensor:
    """(N, Z) → (N,): 1 - cosine of the angle between a token's projected features and the encoder's."""
    return 1 - (F.normalize(projected, dim=-1) * F.normalize(features, dim=-1)).sum(-1)


def reduce_tokens(
    values: Tensor, layout: PackLayout, weights: Tensor | None = None, total: float | None = None, per: str = "token"
) -> Tensor:
    """Weighted average of (N,) values, see the module's head. A pack whose weights are all 0 gives 0."""
    if per not in ("token", "image"):
        raise UserError(f"flow: per={per!r} is unknown; choose token or image")
    lengths = layout.grids.prod(1).to(values.dtype)
    weights = torch.ones_like(lengths) if weights is None else weights.to(values.dtype)
    of_token = weights if per == "token" else weights / lengths
    summed = (values * per_token(of_token, layout)[:, 0]).sum()
    if total is not None:
        return summed / total
    own_total = (weights * lengths if per == "token" else weights).sum()
    return summed / own_total.clamp(min=torch.finfo(values.dtype).tiny)
