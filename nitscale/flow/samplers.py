"""Samplers: a velocity and the starting noise of a pack in, its data out.

A velocity is a callable of the state x (N, F) and the times t (n,), usually a `GuidedVelocity`. Time runs down from
pure noise to data at 0. State and time are float64; the model runs in its own precision. The result has the dtype of
the start.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.flow.guidance import GuidedVelocity, Velocity
from nitscale.flow.paths import data_from_velocity, get_path, score_from_velocity
from nitscale.layout import PackLayout

Draw = Callable[[int], Tensor]
"""Standard normal noise (N, F) of the i-th noisy step; key it by image, and a sample does not depend on its pack."""

SDE_METHODS = ("euler", "heun")
LAST_STEPS = ("mean", "tweedie", "euler", "none")
DIFFUSIONS = ("constant", "sigma", "linear", "decreasing", "increasing-decreasing", "sbdm")


@torch.no_grad()
def euler(
    velocity: Velocity, start: Tensor, layout: PackLayout, *, num_steps: int = 50, path: str = "linear"
) -> Tensor:
    """The probability-flow ODE by Euler's method: `num_steps` evaluations."""
    x = start.double()
    times = time_grid(num_steps, path)
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, _times(now, layout))
    return x.to(start.dtype)


@torch.no_grad()
def heun(
    velocity: Velocity,
    start: Tensor,
    layout: PackLayout,
    *,
    num_steps: int = 50,
    path: str = "linear",
    correct_last: bool = False,
) -> Tensor:
    """The probability-flow ODE by Heun's method (EDM, arXiv 2206.00364 algorithm 1): two evaluations a step, but one
    in the last, unless `correct_last` asks the model for its velocity at the data itself, as the published FiT does."""
    x = start.double()
    times = time_grid(num_steps, path)
    for step, (now, then) in enumerate(pairwise(times)):
        first = velocity(x, _times(now, layout))
        slope = first
        if step + 1 < num_steps or correct_last:
            slope = (first + _within_step(velocity, x + (then - now) * first, then, now, layout)) / 2
        x = x + (then - now) * slope
    return x.to(start.dtype)


@torch.no_grad()
def midpoint(
    velocity: Velocity, start: Tensor, layout: PackLayout, *, num_steps: int = 50, path: str = "linear"
) -> Tensor:
    """The probability-flow ODE by the midpoint method: two evaluations a step."""
    x = start.double()
    times = time_grid(num_steps, path)
    for now, then in pairwise(times):
        half = (then - now) / 2
        first = velocity(x, _times(now, layout))
        x = x + (then - now) * _within_step(velocity, x + half * first, now + half, now, layout)
    return x.to(start.dtype)


@torch.no_grad()
def dopri5(
    velocity: Velocity,
    start: Tensor,
    layout: PackLayout,
    *,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    path: str = "linear",
    error_norm: str = "image",
    stop_at_data: bool = True,
) -> Tensor:
    """The probability-flow ODE by Dormand and Prince's adaptive method of fifth order (torchdiffeq).

    - `error_norm`: "image" holds the error of each image within the tolerances, whatever else is in the pack; "batch"
      averages over all tokens, as the published FiT does.
    - `stop_at_data`: end on t = 0. Otherwise the last step may go beyond and the result is interpolated within it, as
      in the published FiT, which asks the model for times it was never trained on.
    """
    from torchdiffeq import odeint

    if error_norm not in ("image", "batch"):
        raise UserError(f"sampler: error_norm={error_norm!r} is unknown; choose image or batch")
    end = get_path(path).end
    options: dict[str, Any] = {"dtype": torch.float64}
    if error_norm == "image":
        options["norm"] = lambda error: _largest_image_rms(error, layout)
    if stop_at_data:
        options["step_t"] = torch.tensor([end], dtype=torch.float64, device=start.device)

    # torchdiffeq's clock runs up from noise, as its choice of the first step expects
    def upward(elapsed: Tensor, x: Tensor) -> Tensor:
        return -velocity(x, _times(end - elapsed, layout)).double()

    clock = torch.tensor([0.0, end], dtype=torch.float64, device=start.device)
    x = odeint(upward, start.double(), clock, method="dopri5", atol=atol, rtol=rtol, options=options)[-1]
    return x.to(start.dtype)


@torch.no_grad()
def sde(
    velocity: Velocity,
    start: Tensor,
    layout: PackLayout,
    *,
    draw: Draw,
    num_steps: int = 250,
    path: str = "linear",
    method: str = "euler",
    diffusion: str = "linear",
    diffusion_norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = 0.04,
) -> Tensor:
    """The reverse SDE dx = (v - w · score) dt + sqrt(2 w) dW by Euler-Maruyama, or Heun's method in SiT's form
    (arXiv 2401.08740 §2.4): num_steps - 1 noisy steps from noise to `last_step_size`, and one last step without noise.

    - `diffusion` and `diffusion_norm`: w(t), see `diffusion_coefficient`.
    - `last_step`: mean, Euler's step of the SDE without its noise; euler, of the ODE; tweedie, the data that the score
      points to; none, all steps noisy down to t = 0 (FiT's `last_step=None`).
    """
    for name, value, valid in (("method", method, SDE_METHODS), ("last_step", last_step, LAST_STEPS)):
        if value not in valid:
            raise UserError(f"sampler: {name}={value!r} is unknown; choose one of {', '.join(valid)}")
    if num_steps < 2:
        raise UserError(f"sampler: num_steps={num_steps}; the SDE needs a noisy step and a last one")
    end = get_path(path).end
    stop = 0.0 if last_step == "none" else last_step_size * end

    def drift(x: Tensor, now: float, begun: float | None = None) -> Tensor:
        v = velocity(x, _times(now, layout)) if begun is None else _within_step(velocity, x, now, begun, layout)
        t = torch.tensor(now, dtype=torch.float64, device=x.device)
        return v - diffusion_coefficient(diffusion, now, path, diffusion_norm) * score_from_velocity(v, x, t, path)

    x = start.double()
    times = torch.linspace(end, stop, num_steps, dtype=torch.float64).tolist()
    for step, (now, then) in enumerate(pairwise(times)):
        dt = then - now
        strength = math.sqrt(2 * diffusion_coefficient(diffusion, now, path, diffusion_norm) * abs(dt))
        kick = strength * draw(step).double()
        if method == "euler":
            x = x + dt * drift(x, now) + kick
        else:
            x = x + kick
            first = drift(x, now)
            x = x + dt * (first + drift(x + dt * first, then, now)) / 2
    if last_step == "mean":
        x = x - stop * drift(x, stop)
    elif last_step == "euler":
        x = x - stop * velocity(x, _times(stop, layout))
    elif last_step == "tweedie":
        t = torch.tensor(stop, dtype=torch.float64, device=x.device)
        x = data_from_velocity(velocity(x, _times(stop, layout)), x, t, path)
    return x.to(start.dtype)


def time_grid(num_steps: int, path: str = "linear") -> list[float]:
    """num_steps + 1 evenly spaced times from noise to data."""
    if num_steps < 1:
        raise UserError(f"sampler: num_steps={num_steps} must be at least 1")
    return torch.linspace(get_path(path).end, 0.0, num_steps + 1, dtype=torch.float64).tolist()


def diffusion_coefficient(form: str, t: float, path: str = "linear", norm: float = 1.0) -> float:
    """w(t), forms of SiT (arXiv 2401.08740 table 2), up to `norm`. `linear`, w = t, is what the published NiT samples
    with on every path; `sigma`, the published FiT's, is the same on the linear path. `sbdm` is the diffusion of
    score-based models, infinite at pure noise."""
    if form == "constant":
        return norm
    if form == "sigma":
        return norm * float(get_path(path).sigma(torch.tensor(t, dtype=torch.float64)))
    s = t / get_path(path).end
    if form == "linear":
        return norm * s
    if form == "decreasing":
        return 0.25 * (norm * math.cos(math.pi * (1 - s)) + 1) ** 2
    if form == "increasing-decreasing":
        return norm * math.sin(math.pi * s) ** 2
    if form == "sbdm":
        p, time = get_path(path), torch.tensor(t, dtype=torch.float64)
        alpha, sigma, d_alpha, d_sigma = (f(time) for f in (p.alpha, p.sigma, p.d_alpha, p.d_sigma))
        return norm * float(sigma * d_sigma - d_alpha / alpha * sigma**2)
    raise UserError(f"sampler: diffusion={form!r} is unknown; choose one of {', '.join(DIFFUSIONS)}")


def _times(t: float | Tensor, layout: PackLayout) -> Tensor:
    device = layout.segment_ids.device
    return torch.as_tensor(t, dtype=torch.float64, device=device).expand(layout.num_segments)


def _within_step(velocity: Velocity, x: Tensor, now: float, begun: float, layout: PackLayout) -> Tensor:
    """An evaluation after a step's first, at `now` in a step that began at `begun`."""
    if isinstance(velocity, GuidedVelocity):
        return velocity(x, _times(now, layout), step_t=_times(begun, layout))
    return velocity(x, _times(now, layout))


def _largest_image_rms(error: Tensor, layout: PackLayout) -> Tensor:
    """The largest of the images' root mean squares of (N, F); of a scalar, its magnitude."""
    if error.ndim < 2:
        return error.abs().max()
    squares = torch.stack([part.square().mean() for part in error.split(list(layout.lengths))])
    return squares.max().sqrt()
