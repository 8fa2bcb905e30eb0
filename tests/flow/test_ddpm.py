"""The DDPM objective and DDIM, on data whose exact noise prediction is known."""

import math

import pytest
import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.flow.ddpm import Schedule, add_noise, ancestral, ddim, ddpm_loss, sample_steps, variational_bound
from nitscale.layout import PackLayout

SCHEDULE = Schedule()
LAYOUT = PackLayout.from_grids([(1, 2), (1, 3)])


def test_the_schedule_is_the_published_linear_one() -> None:
    assert SCHEDULE.betas[0] == 1e-4 and SCHEDULE.betas[-1] == 0.02 and len(SCHEDULE.betas) == 1000
    assert SCHEDULE.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-3)
    assert SCHEDULE.posterior_variance[0] == 0


def test_noise_is_added_at_each_image_own_step() -> None:
    data, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = add_noise(data, noise, torch.tensor([0, 999]), LAYOUT)
    alpha = SCHEDULE.alphas_cumprod[torch.tensor([0, 0, 999, 999, 999])][:, None]
    assert torch.allclose(x, alpha.sqrt() * data + (1 - alpha).sqrt() * noise)
    steps = sample_steps(500, torch.Generator().manual_seed(0))
    assert steps.min() >= 0 and steps.max() <= 999 and steps.double().mean().item() == pytest.approx(500, abs=40)


def test_the_loss_is_the_error_of_the_noise_and_the_bound_trains_the_variance_alone() -> None:
    data, noise, guess, variance = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    steps = torch.tensor([10, 500])
    plain = ddpm_loss(guess, data, noise, steps, LAYOUT, per="token")
    assert plain.item() == pytest.approx((guess - noise).square().mean().item())
    guess.requires_grad_()
    variance.requires_grad_()
    ddpm_loss(torch.cat([guess, variance], dim=1), data, noise, steps, LAYOUT, per="token").backward()
    assert guess.grad is not None and variance.grad is not None
    assert torch.allclose(guess.grad, 2 * (guess.detach() - noise) / 15)
    assert variance.grad.ne(0).all()
    with pytest.raises(UserError, match="4 features"):
        ddpm_loss(torch.zeros(5, 4), data, noise, steps, LAYOUT)


def test_the_bound_is_zero_for_the_exact_noise_and_the_posterior_variance() -> None:
    data, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = torch.tensor([10, 500])
    x = add_noise(data, noise, steps, LAYOUT)
    bound = variational_bound(noise, torch.full_like(noise, -1.0), x, data, steps, LAYOUT)
    assert bound.abs().max() < 1e-9
    assert (variational_bound(noise, torch.zeros_like(noise), x, data, steps, LAYOUT) > 1e-9).all()


def test_the_bound_at_the_last_step_is_a_likelihood_in_bits() -> None:
    data = torch.zeros(5, 3, dtype=torch.float64)
    steps = torch.tensor([0, 0])
    bound = variational_bound(data, torch.full_like(data, -1.0), data, data, steps, LAYOUT)
    std = SCHEDULE.posterior_variance[1].sqrt().item()
    mass = math.erf(1 / 255 / std / math.sqrt(2))
    assert torch.allclose(bound, torch.full((5,), -math.log2(mass), dtype=torch.float64), atol=1e-3)


MEAN, STD = 2.0, 0.5


def exact_noise(x: Tensor, t: Tensor) -> Tensor:
    """The noise prediction for data N(2, 0.5²), which is linear; and for each feature a variance of -1, the least."""
    alpha = SCHEDULE.alphas_cumprod[round(t[0].item() * 1000)]
    noise = (1 - alpha).sqrt() * (x - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)
    return torch.cat([noise, torch.full_like(x, -1.0)], dim=1)


def test_ddim_finds_the_data_that_the_exact_noise_points_to() -> None:
    """The flow maps N(0, 1) onto the data."""
    seen: list[float] = []

    def noise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return exact_noise(x, t)

    start = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = ddim(noise, start, LAYOUT, num_steps=500)
    assert torch.allclose(sample, MEAN + STD * start, atol=0.05)
    assert seen[0] == 0.999 and seen[-1] == 0.0 and len(seen) == 500
    with pytest.raises(UserError, match="num_steps=1001"):
        ddim(noise, start, LAYOUT, num_steps=1001)


@pytest.mark.parametrize("learned", [True, False])
def test_ancestral_samples_have_the_mean_and_deviation_of_the_data(learned: bool) -> None:
    layout = PackLayout.from_grids([(1, 1)])
    generator = torch.Generator().manual_seed(0)
    drawn: list[int] = []

    def draw(step: int) -> Tensor:
        drawn.append(step)
        return torch.randn(1, 20_000, generator=generator, dtype=torch.float64)

    def noise(x: Tensor, t: Tensor) -> Tensor:
        return exact_noise(x, t)[:, : x.shape[1] * (2 if learned else 1)]

    sample = ancestral(noise, draw(-1), layout, draw=draw, num_steps=250)
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert sample.std().item() == pytest.approx(STD, abs=0.02)
    assert drawn == list(range(-1, 249))


def test_a_step_of_ancestral_sampling_is_the_posterior_of_the_two_steps() -> None:
    """Two steps, 999 and 0, written out: mean and variance of q(x_0 | x_999, data), the variance between its bounds."""
    x, noise, variance, drawn = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far, near = SCHEDULE.alphas_cumprod[[999, 0]]
    outputs = iter([torch.cat([noise, variance], dim=1), torch.zeros(5, 6, dtype=torch.float64)])
    sample = ancestral(lambda x, t: next(outputs), x, LAYOUT, draw=lambda step: drawn, num_steps=2)

    data = (x - (1 - far).sqrt() * noise) / far.sqrt()
    kept = far / near  # x_999 = sqrt(kept) x_0 + sqrt(1 - kept) noise
    precision = 1 / (1 - near) + kept / (1 - kept)
    mean = (near.sqrt() * data / (1 - near) + kept.sqrt() * x / (1 - kept)) / precision
    std = precision.pow(-0.5) ** ((1 - variance) / 2) * (1 - kept).sqrt() ** ((1 + variance) / 2)
    assert torch.allclose(sample, (mean + std * drawn) / near.sqrt())
