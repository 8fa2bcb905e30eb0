"""Paths and timestep laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nitscale.errors import UserError
from nitscale.flow.paths import (
    PATHS,
    data_from_velocity,
    get_path,
    interpolate,
    per_token,
    score_from_velocity,
)
from nitscale.flow.timesteps import logit_normal, mode, sample_timesteps
from nitscale.layout import PackLayout

LAYOUT = PackLayout.from_grids([(2, 3), (1, 2)])


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_leads_from_data_to_noise(path: str) -> None:
    data, noise = pair()
    start, _ = interpolate(data, noise, torch.zeros(2), LAYOUT, path)
    end, _ = interpolate(data, noise, torch.full((2,), get_path(path).end, dtype=torch.float64), LAYOUT, path)
    assert torch.allclose(start, data)
    assert torch.allclose(end, noise)


@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_is_the_derivative_of_the_path(path: str) -> None:
    data, noise = pair()
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    step = 1e-6
    before, _ = interpolate(data, noise, t - step, LAYOUT, path)
    after, _ = interpolate(data, noise, t + step, LAYOUT, path)
    _, velocity = interpolate(data, noise, t, LAYOUT, path)
    assert torch.allclose((after - before) / (2 * step), velocity, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_data_and_score_are_found_from_the_velocity(path: str) -> None:
    data, noise = pair()
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    x, velocity = interpolate(data, noise, t, LAYOUT, path)
    of_token = per_token(t, LAYOUT)
    assert torch.allclose(data_from_velocity(velocity, x, of_token, path), data)
    score = score_from_velocity(velocity, x, of_token, path)
    assert torch.allclose(score, -noise / get_path(path).sigma(of_token))


def test_the_linear_path_is_that_of_nit() -> None:
    data, noise = pair()
    x, velocity = interpolate(data, noise, torch.tensor([0.25, 0.5], dtype=torch.float64), LAYOUT)
    assert torch.equal(velocity, noise - data)
    assert torch.equal(x[:6], 0.75 * data[:6] + 0.25 * noise[:6])
    assert torch.equal(x[6:], 0.5 * data[6:] + 0.5 * noise[6:])


def test_states_keep_the_dtype_of_the_data() -> None:
    data, noise = (tensor.float() for tensor in pair())
    x, velocity = interpolate(data, noise, torch.tensor([0.25, 0.5], dtype=torch.float64), LAYOUT)
    assert x.dtype == velocity.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("law", ["uniform", "logit-normal", "mode"])
def test_times_lie_on_the_path_and_follow_the_key(path: str, law: str) -> None:
    draw = [sample_timesteps(2000, torch.Generator().manual_seed(3), law, path=path) for _ in range(2)]
    assert torch.equal(*draw)
    end = get_path(path).end
    assert draw[0].min() >= 0 and draw[0].max() <= end
    assert draw[0].mean().item() == pytest.approx(end / 2, abs=0.03 * end)


def test_logit_normal_times_have_a_normal_logit() -> None:
    t = sample_timesteps(20_000, torch.Generator().manual_seed(0), "logit-normal", mean=0.5, std=2.0)
    logit = torch.logit(t)
    assert logit.mean().item() == pytest.approx(0.5, abs=0.05)
    assert logit.std().item() == pytest.approx(2.0, abs=0.05)


def test_logit_normal_times_have_one_noise_to_data_ratio_on_every_path() -> None:
    normal = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for name, path in PATHS.items():
        t = logit_normal(normal, 0.3, 1.5, name)
        assert torch.allclose(path.sigma(t) / path.alpha(t), torch.exp(1.5 * normal + 0.3))


@given(st.floats(-1.0, 2 / (math.pi - 2)))
def test_mode_times_fall_from_one_to_zero(scale: float) -> None:
    t = mode(torch.linspace(0, 1, 101, dtype=torch.float64), scale)
    assert t[0].item() == pytest.approx(1) and t[-1].item() == pytest.approx(0)
    assert (t.diff() <= 1e-12).all()


def test_unknown_names_are_errors() -> None:
    with pytest.raises(UserError, match="'quadratic'"):
        get_path("quadratic")
    with pytest.raises(UserError, match="'lognormal'"):
        sample_timesteps(1, torch.Generator(), "lognormal")
    with pytest.raises(UserError, match="mode_scale=3"):
        sample_timesteps(1, torch.Generator(), "mode", mode_scale=3)
