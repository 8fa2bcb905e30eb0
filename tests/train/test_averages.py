"""Averages of the weights as arithmetic, against sums over the whole history."""

import numpy as np
import pytest

from nitscale.train.averages import Profile, combine_snapshots, decay_at, gamma_of_width, make_profiles


def average(profile: Profile, values: np.ndarray) -> np.ndarray:
    """(steps,) the running average of (steps,) values that begins at 0."""
    mean, history = 0.0, []
    for step, value in enumerate(values):
        kept = decay_at(profile, step)
        mean = kept * mean + (1 - kept) * value
        history.append(mean)
    return np.array(history)


def test_an_exponential_average_keeps_its_decay_after_the_ramp() -> None:
    ramped, plain = make_profiles([0.99])[0], make_profiles([0.99], ramp=False)[0]
    assert [decay_at(ramped, step) for step in (0, 8, 10_000)] == [0.1, 0.5, 0.99]
    assert decay_at(plain, 0) == 0.99


def test_averages_are_named_by_what_was_asked_for() -> None:
    assert [p.name for p in make_profiles([0.9999, 0.9], [0.05])] == ["0.9999", "0.9", "power-0.05"]


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2])
def test_a_power_average_weighs_steps_by_a_power_of_time_and_has_its_width(width: float) -> None:
    steps, gamma = 20_000, gamma_of_width(width)
    kept = np.array([decay_at(make_profiles([], [width])[0], step) for step in range(steps)])
    later = np.append(np.cumprod(kept[:0:-1])[::-1], 1.0)
    weights = (1 - kept) * later
    ends = (np.arange(steps + 1) / steps) ** (gamma + 1)
    np.testing.assert_allclose(weights, np.diff(ends), rtol=1e-9, atol=1e-300)
    time = (np.arange(steps) + 0.5) / steps
    mean = (weights * time).sum()
    assert np.sqrt((weights * (time - mean) ** 2).sum()) == pytest.approx(width, rel=1e-3)


def test_the_published_exponents_are_found() -> None:
    # EDM2, §3.2: σ_rel = 0.05 and 0.10 are γ = 16.97 and 6.94.
    assert [round(gamma_of_width(width), 2) for width in (0.05, 0.1)] == [16.97, 6.94]


@pytest.mark.parametrize("width", [0.0, 0.29, 1.0, float("nan")])
def test_a_width_that_no_power_average_has_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match="width"):
        make_profiles([], [width])


@pytest.mark.parametrize("decays", [[1.0], [-0.1], [float("nan")], [0.9, 0.9]])
def test_decays_out_of_range_and_averages_asked_for_twice_are_refused(decays: list[float]) -> None:
    with pytest.raises(ValueError, match=r"decay|another one"):
        make_profiles(decays)


@pytest.mark.parametrize(("width", "time"), [(0.05, 4000), (0.075, 4000), (0.12, 4000), (0.08, 3300)])
def test_an_average_put_together_afterwards_is_the_one_that_was_not_kept(width: float, time: int) -> None:
    steps, every = 4000, 250
    walk = np.cumsum(np.random.default_rng(0).normal(size=steps))
    stored = [(p.gamma, average(p, walk)) for p in make_profiles([], [0.05, 0.1])]
    times = [t for t in range(every, steps + 1, every) for _ in stored]
    gammas = [gamma for _ in range(every, steps + 1, every) for gamma, _ in stored if gamma is not None]
    values = np.array([history[t - 1] for t in range(every, steps + 1, every) for _, history in stored])
    weights = combine_snapshots(times, gammas, time, gamma_of_width(width))
    wanted = average(make_profiles([], [width])[0], walk)[time - 1]
    assert weights.sum() == pytest.approx(1)
    assert weights @ values == pytest.approx(wanted, abs=0.01 * walk.std())


def test_an_average_later_than_all_that_are_stored_is_refused() -> None:
    with pytest.raises(ValueError, match="as late as step 300"):
        combine_snapshots([100, 200], [7.0, 7.0], 300, 7.0)
