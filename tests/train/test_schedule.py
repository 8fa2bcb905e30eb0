"""The learning rate as a function of step and tokens."""

import warnings
from typing import Any

import pytest

from nitscale.errors import UserError
from nitscale.train.schedule import ScheduleConfig, check_schedule, learning_rate


def rates(schedule: ScheduleConfig, steps: int, step_tokens: int = 100) -> list[float]:
    """The rates of a run whose steps are all full, of peak 1."""
    return [
        learning_rate(
            schedule,
            1.0,
            step=step,
            steps=steps,
            tokens=step * step_tokens,
            step_tokens=step_tokens,
            nominal_step_tokens=step_tokens,
        )
        for step in range(steps)
    ]


def test_the_warm_up_rises_from_the_first_step_and_ends_with_its_tokens() -> None:
    assert rates(ScheduleConfig(warmup_tokens=400), 6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_warm_up_depends_on_tokens_and_not_on_steps() -> None:
    schedule = ScheduleConfig(warmup_tokens=1000)
    few: dict[str, Any] = {"steps": 10, "tokens": 300, "step_tokens": 200, "nominal_step_tokens": 200}
    assert learning_rate(schedule, 2.0, step=1, **few) == learning_rate(schedule, 2.0, step=7, **few) == 1.0


def test_a_cosine_goes_from_the_peak_to_its_final_factor() -> None:
    assert rates(ScheduleConfig(kind="cosine", final=0.1), 5) == pytest.approx([1, 0.868198, 0.55, 0.231802, 0.1])


def test_wsd_is_constant_and_then_falls_in_a_line() -> None:
    schedule = ScheduleConfig(kind="wsd", final=0.2, decay_fraction=0.5)
    assert rates(schedule, 9) == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_the_rate_is_scaled_by_the_nominal_tokens_of_a_step() -> None:
    for scaling, factor in (("linear", 4), ("sqrt", 2)):
        schedule = ScheduleConfig(scaling=scaling, reference_tokens=1000)  # type: ignore[arg-type]
        rate = learning_rate(schedule, 1e-4, step=0, steps=9, tokens=0, step_tokens=3977, nominal_step_tokens=4000)
        assert rate == pytest.approx(1e-4 * factor)
    assert rates(ScheduleConfig(), 2, step_tokens=4000) == [1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup_tokens": -1}, "negative"),
        ({"decay_fraction": 0.0}, "decay_fraction"),
        ({"kind": "cosine", "decay_fraction": 0.5}, "no effect with kind=cosine"),
        ({"kind": "constant", "final": 0.1}, "no effect with kind=constant"),
        ({"reference_tokens": 4096}, "no effect with scaling=none"),
        ({"scaling": "sqrt"}, "needs reference_tokens"),
        ({"scaling": "linear", "reference_tokens": 0}, "needs reference_tokens"),
    ],
)
def test_settings_that_contradict_or_would_be_ignored_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ScheduleConfig(**settings)


def test_a_warm_up_shorter_than_a_step_is_refused_and_one_longer_than_the_run_is_warned_of() -> None:
    with pytest.raises(UserError, match="count tokens and not steps"):
        check_schedule(ScheduleConfig(warmup_tokens=100), steps=10, nominal_step_tokens=4096)
    with pytest.warns(UserWarning, match="never reached"):
        check_schedule(ScheduleConfig(warmup_tokens=100_000), steps=10, nominal_step_tokens=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_schedule(ScheduleConfig(warmup_tokens=10_000), steps=10, nominal_step_tokens=4096)
        check_schedule(ScheduleConfig(), steps=10, nominal_step_tokens=4096)
