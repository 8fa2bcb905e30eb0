"""Fréchet distance between two sets of features, each taken as a Gaussian (Heusel et al., arXiv 1706.08500, eq. 6)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from nitscale.errors import UserError

POOLED = 2
"""Cells a side of the coarse grid that a latent is averaged over."""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½) of features (n₁, d) and (n₂, d), in float64.

    UserError for fewer than two images on either side."""
    if min(len(a), len(b)) < 2:
        raise UserError(
            f"evaluate: a Fréchet distance needs two images or more on both sides, got {len(a)} and {len(b)}"
        )
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    # tr (C₁ C₂)^½ = Σ √λ of the symmetric C₁^½ C₂ C₁^½, which has the same eigenvalues.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    # The root of a singular product is known to about 1e-7 of the traces, on either side.
    return max(float(mean + cov_a.trace() + cov_b.trace() - 2 * cross), 0.0)


def latent_features(latents: Iterable[Tensor]) -> Tensor:
    """(n, 4 c): each latent (c, h, w) of any size, averaged over a 2 x 2 grid of its picture."""
    return torch.stack([F.adaptive_avg_pool2d(latent.float(), POOLED).flatten() for latent in latents])
