"""Paths between data and noise: x_t = α(t) · data + σ(t) · noise, with t = 0 at data and noise at the path's end.

Times are (n,), one an image; data, noise and states (N, F), the tokens of a pack. The velocity is dx/dt, so that a
sampler integrates it from noise down to t = 0. Stochastic interpolants, arXiv 2303.08797; SiT, arXiv 2401.08740.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.layout import PackLayout


@dataclass(frozen=True)
class Path:
    """α, σ and their derivatives as functions of time."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    time_of_ratio: Callable[[Tensor], Tensor]
    """The time at which σ / α has a given value."""
    end: float = 1.0
    """The time of pure noise."""


HALF_PI = math.pi / 2

PATHS = {
    "linear": Path(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        d_alpha=lambda t: -torch.ones_like(t),
        d_sigma=lambda t: torch.ones_like(t),
        time_of_ratio=lambda ratio: ratio / (1 + ratio),
    ),
    "cosine": Path(
        alpha=lambda t: torch.cos(HALF_PI * t),
        sigma=lambda t: torch.sin(HALF_PI * t),
        d_alpha=lambda t: -HALF_PI * torch.sin(HALF_PI * t),
        d_sigma=lambda t: HALF_PI * torch.cos(HALF_PI * t),
        time_of_ratio=lambda ratio: torch.atan(ratio) / HALF_PI,
    ),
    # The same circle with the angle itself for time, 0 to π/2, and unit speed (TrigFlow, arXiv 2410.11081).
    "triangular": Path(
        alpha=torch.cos,
        sigma=torch.sin,
        d_alpha=lambda t: -torch.sin(t),
        d_sigma=torch.cos,
        time_of_ratio=torch.atan,
        end=HALF_PI,
    ),
}


def get_path(name: str) -> Path:
    if name not in PATHS:
        raise UserError(f"flow: path={name!r} is unknown; choose one of {', '.join(PATHS)}")
    return PATHS[name]


def interpolate(
    data: Tensor, noise: Tensor, t: Tensor, layout: PackLayout, path: str = "linear"
) -> tuple[Tensor, Tensor]:
    """The state x_t and its velocity, both (N, F), at each image's time t (n,): the model's input and its target."""
    p = get_path(path)
    alpha, sigma, d_alpha, d_sigma = (per_token(f(t), layout) for f in (p.alpha, p.sigma, p.d_alpha, p.d_sigma))
    return (alpha * data + sigma * noise).to(data.dtype), (d_alpha * data + d_sigma * noise).to(data.dtype)


def score_from_velocity(velocity: Tensor, x: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """∇ log p_t(x) of the velocity at x; t broadcasts against them. Infinite at t = 0, where p_t is the data itself."""
    p = get_path(path)
    alpha, sigma, d_alpha, d_sigma = p.alpha(t), p.sigma(t), p.d_alpha(t), p.d_sigma(t)
    # α · velocity - α' · x = (α σ' - α' σ) · noise, and the score is -noise / σ
    return (d_alpha * x - alpha * velocity) / (sigma * (alpha * d_sigma - d_alpha * sigma))


def data_from_velocity(velocity: Tensor, x: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """The data that the velocity at x points to: E[data | x_t = x]; t broadcasts against them."""
    p = get_path(path)
    alpha, sigma, d_alpha, d_sigma = p.alpha(t), p.sigma(t), p.d_alpha(t), p.d_sigma(t)
    return (d_sigma * x - sigma * velocity) / (alpha * d_sigma - d_alpha * sigma)


def per_token(values: Tensor, layout: PackLayout) -> Tensor:
    """(n,) → (N, 1): the value of each token's image."""
    return values.index_select(0, layout.segment_ids)[:, None]
