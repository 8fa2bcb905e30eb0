"""The DDPM objective and its samplers, ancestral and DDIM. FiT v1 (arXiv 2402.12376) predicts noise and its variance.

The model takes t = step / steps, so that times run 0 = data → 1 = noise here too, and returns (N, F) noise, or (N, 2 F)
noise and variance. DDPM, arXiv 2006.11239; learned variance, arXiv 2102.09672; DDIM, arXiv 2010.02502.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.flow.guidance import Velocity
from nitscale.flow.losses import reduce_tokens, squared_error
from nitscale.flow.paths import per_token
from nitscale.flow.samplers import Draw
from nitscale.layout import PackLayout


@dataclass(frozen=True)
class Schedule:
    """A linear schedule of noise variances β, (steps,) float64 tables."""

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    @cached_property
    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ: the share of the data's variance left at each step."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def posterior_variance(self) -> Tensor:
        """The variance of q(x_{s-1} | x_s, data)."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        return self.betas * (1 - before) / (1 - self.alphas_cumprod)

    @cached_property
    def log_variance_range(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the least variance of a step and of the largest. Step 0 has none; it takes step 1's."""
        least = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]])
        return torch.log(least), torch.log(self.betas)


def sample_steps(n: int, generator: torch.Generator, schedule: Schedule = Schedule()) -> Tensor:
    """`n` uniform steps, (n,) int64; the model sees them as steps / schedule.steps."""
    return torch.randint(schedule.steps, (n,), generator=generator, device=generator.device)


def add_noise(
    data: Tensor, noise: Tensor, steps: Tensor, layout: PackLayout, schedule: Schedule = Schedule()
) -> Tensor:
    """x_s (N, F) at each image's step (n,): sqrt(ᾱ) data + sqrt(1 - ᾱ) noise."""
    alpha = per_token(schedule.alphas_cumprod.to(data.device)[steps], layout)
    return (alpha.sqrt() * data + (1 - alpha).sqrt() * noise).to(data.dtype)


def ddpm_loss(
    output: Tensor,
    data: Tensor,
    noise: Tensor,
    steps: Tensor,
    layout: PackLayout,
    weights: Tensor | None = None,
    total: float | None = None,
    per: str = "image",
    schedule: Schedule = Schedule(),
) -> Tensor:
    """The mean squared error of the noise, plus, for an output of 2 F features, the variational bound (bits a feature)
    that trains the variance alone: the noise has no gradient from it (arXiv 2102.09672 §3.1)."""
    features = data.shape[1]
    errors = squared_error(output[:, :features], noise)
    if output.shape[1] == 2 * features:
        x = add_noise(data, noise, steps, layout, schedule)
        predicted, variance = output[:, :features].detach(), output[:, features:]
        errors = errors + variational_bound(predicted, variance, x, data, steps, layout, schedule)
    elif output.shape[1] != features:
        raise UserError(f"ddpm: the model gave {output.shape[1]} features; {features} or {2 * features} are needed")
    return reduce_tokens(errors, layout, weights, total, per)


def variational_bound(
    noise: Tensor,
    variance: Tensor,
    x: Tensor,
    data: Tensor,
    steps: Tensor,
    layout: PackLayout,
    schedule: Schedule = Schedule(),
) -> Tensor:
    """(N,): bits a feature of the step from x_s to x_{s-1}; the divergence of the model's normal from the true one, and
    at step 0 the likelihood of the data in bins of 2/255. `variance` in -1…1 interpolates the log of its range."""

    def at(table: Tensor) -> Tensor:
        return per_token(table.to(x.device)[steps], layout)

    alpha_bar, beta = at(schedule.alphas_cumprod), at(schedule.betas)
    before = (alpha_bar / (1 - beta)).clamp(max=1.0)
    least, largest = (at(table) for table in schedule.log_variance_range)
    log_variance = least + (variance.double() + 1) / 2 * (largest - least)
    predicted = (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()

    def posterior_mean(start: Tensor) -> Tensor:
        return (before.sqrt() * beta * start + (1 - beta).sqrt() * (1 - before) * x) / (1 - alpha_bar)

    mean, true_mean = posterior_mean(predicted), posterior_mean(data.double())
    divergence = 0.5 * (
        log_variance - least - 1 + torch.exp(least - log_variance) + (true_mean - mean) ** 2 * torch.exp(-log_variance)
    )
    likelihood = -_discretized_log_likelihood(data.double(), mean, 0.5 * log_variance)
    is_first = per_token((steps == 0).to(x.device), layout)
    return (torch.where(is_first, likelihood, divergence).mean(-1) / math.log(2)).to(x.dtype)


@torch.no_grad()
def ddim(
    model: Velocity,
    start: Tensor,
    layout: PackLayout,
    *,
    num_steps: int = 250,
    schedule: Schedule = Schedule(),
) -> Tensor:
    """DDIM without noise (η = 0): `model` is a callable of x (N, F) and t (n,) that gives the noise, for example a
    `GuidedVelocity`; features beyond F are left alone. Steps are evenly spaced from the last to 0."""
    x = start.double()
    for t, alpha, alpha_next in _chosen_steps(num_steps, schedule, layout):
        noise = model(x, t)[:, : x.shape[1]].double()
        data = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
        x = math.sqrt(alpha_next) * data + math.sqrt(1 - alpha_next) * noise
    return x.to(start.dtype)


@torch.no_grad()
def ancestral(
    model: Velocity,
    start: Tensor,
    layout: PackLayout,
    *,
    draw: Draw,
    num_steps: int = 250,
    schedule: Schedule = Schedule(),
) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239 algorithm 2) over evenly spaced steps, as the published FiT v1 is sampled:
    each but the last draws from the posterior, with the learned variance where `model` gives 2 F features, else with
    the variance β. `draw` as in `samplers.sde`."""
    x, features = start.double(), start.shape[1]
    for step, (t, alpha, alpha_next) in enumerate(_chosen_steps(num_steps, schedule, layout)):
        output = model(x, t).double()
        data = (x - math.sqrt(1 - alpha) * output[:, :features]) / math.sqrt(alpha)
        if step + 1 == num_steps:
            return data.to(start.dtype)
        beta = 1 - alpha / alpha_next  # of the steps from one chosen step to the next
        of_data, of_x = math.sqrt(alpha_next) * beta, math.sqrt(1 - beta) * (1 - alpha_next)
        log_variance = torch.full_like(x, math.log(beta))
        if output.shape[1] == 2 * features:
            least = math.log(beta * (1 - alpha_next) / (1 - alpha))
            log_variance = least + (output[:, features:] + 1) / 2 * (math.log(beta) - least)
        x = (of_data * data + of_x * x) / (1 - alpha) + torch.exp(0.5 * log_variance) * draw(step).double()
    raise AssertionError("there is a last step")


def _chosen_steps(num_steps: int, schedule: Schedule, layout: PackLayout) -> Iterator[tuple[Tensor, float, float]]:
    """(t (n,), ᾱ, the next step's ᾱ) of evenly spaced steps from the last of the schedule to 0."""
    if not 1 <= num_steps <= schedule.steps:
        raise UserError(f"sampler: num_steps={num_steps} is not between 1 and the schedule's {schedule.steps}")
    device = layout.segment_ids.device
    chosen = torch.linspace(schedule.steps - 1, 0, num_steps, dtype=torch.float64).round().long().tolist()
    kept = schedule.alphas_cumprod[chosen].tolist()
    for step, alpha, alpha_next in zip(chosen, kept, [*kept[1:], 1.0], strict=True):
        yield (
            torch.full((layout.num_segments,), step / schedule.steps, dtype=torch.float64, device=device),
            alpha,
            alpha_next,
        )


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log of the normal's mass in the bin of width 2/255 around x; the outermost bins reach to infinity."""
    inverse = torch.exp(-log_std)
    upper = _normal_cdf((x - mean + 1 / 255) * inverse)
    lower = _normal_cdf((x - mean - 1 / 255) * inverse)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return torch.log(mass.clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    # the published code's approximation by tanh, and not erf
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
