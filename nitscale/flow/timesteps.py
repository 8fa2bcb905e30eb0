"""Laws that training draws its times from, one time an image, (n,) float64 between data (0) and noise.

Each law is a function of uniform or normal draws, so that a caller keys the draws as it likes.
"""

import math

import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.flow.paths import get_path

LAWS = ("uniform", "logit-normal", "mode")


def sample_timesteps(
    n: int,
    generator: torch.Generator,
    law: str = "logit-normal",
    *,
    path: str = "linear",
    mean: float = 0.0,
    std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """`n` times, (n,) float64 on the generator's device. `mean` and `std` belong to logit-normal, `mode_scale` to mode.

    logit-normal is what NiT trains with, and FiTv2 (its paper's eq. 13 is printed inverted; the law is symmetric about
    1/2 for mean 0, so that the direction of time does not matter).
    """
    if law not in LAWS:
        raise UserError(f"flow: timestep law {law!r} is unknown; choose one of {', '.join(LAWS)}")
    draw = torch.randn if law == "logit-normal" else torch.rand
    draws = draw(n, generator=generator, dtype=torch.float64, device=generator.device)
    if law == "logit-normal":
        return logit_normal(draws, mean, std, path)
    return get_path(path).end * (draws if law == "uniform" else mode(draws, mode_scale))


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0, path: str = "linear") -> Tensor:
    """The time where σ / α = exp(std · normal + mean): on the linear path, its logit is normal (arXiv 2403.03206)."""
    return get_path(path).time_of_ratio(torch.exp(std * normal + mean))


def mode(uniform: Tensor, scale: float = 1.29) -> Tensor:
    """SD3's law with heavy tails, arXiv 2403.03206 eq. 20: 1 - u - s · (cos²(π u / 2) - 1 + u); monotone for
    -1 ≤ s ≤ 2 / (π - 2)."""
    if not -1.0 <= scale <= 2 / (math.pi - 2):
        raise UserError(f"flow: mode_scale={scale} is outside -1 to {2 / (math.pi - 2):.3f}")
    return 1 - uniform - scale * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)
