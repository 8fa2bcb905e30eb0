"""Adaptive clipping: what raises the limit, and what must not."""

import pytest
import torch
from torch import Tensor

from nitscale.train.clipping import AdaptiveClipConfig, clip_state, limit_and_update

CONFIG = AdaptiveClipConfig(factor=2.0, decay=0.9, warmup_steps=5)


def limits(norms: list[float], config: AdaptiveClipConfig = CONFIG, ceiling: float = float("inf")) -> list[float]:
    state, found = clip_state(), []
    for norm in norms:
        limit, state = limit_and_update(state, torch.tensor(norm), config, ceiling)
        found.append(limit.item())
    return found


def test_the_fixed_limit_holds_during_the_warm_up_and_then_a_multiple_of_the_mean() -> None:
    assert limits([0.1, 0.3, 0.1, 0.3, 0.2, 0.2], ceiling=10.0) == pytest.approx([10] * 5 + [0.4])


def test_the_mean_forgets_at_its_decay() -> None:
    plain, mean = [1.0] * 10 + [1.5] * 6, 1.0
    for norm in plain[10:-1]:
        mean = 0.9 * mean + 0.1 * norm
    assert limits(plain)[-1] == pytest.approx(2 * mean)


def test_the_limit_is_never_above_the_fixed_one() -> None:
    assert limits([0.8] * 7, ceiling=1.0)[-1] == 1.0


def test_a_burst_raises_the_limit_no_more_than_a_norm_at_the_limit_does() -> None:
    calm = [1.0] * 20
    after_burst, after_limit = limits([*calm, 1e6, 1.0]), limits([*calm, 2.0, 1.0])
    assert after_burst == pytest.approx(after_limit)
    assert after_burst[-1] < 2.3


def test_a_lasting_rise_is_followed() -> None:
    followed = limits([1.0] * 20 + [50.0] * 60)
    assert followed[20] == pytest.approx(2.0) and followed[-1] > 50


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_norm_that_is_not_finite_changes_nothing(bad: float) -> None:
    state = torch.tensor([1.0, 20.0])
    limit, after = limit_and_update(state, torch.tensor(bad), CONFIG, 5.0)
    assert limit == 2.0 and torch.equal(after, state)


def test_without_a_factor_the_fixed_limit_stands_and_nothing_is_kept() -> None:
    limit, after = limit_and_update(clip_state(), torch.tensor(3.0), AdaptiveClipConfig(), torch.tensor(1.0))
    assert limit == 1.0 and torch.equal(after, clip_state())


def test_no_step_waits_for_the_host() -> None:
    norm = torch.tensor(1.0)
    synchronized: list[str] = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            if "_local_scalar_dense" in str(function):
                synchronized.append(str(function))
            return function(*arguments, **(options or {}))

    state: Tensor = clip_state()
    with Watched():
        for _ in range(3):
            _, state = limit_and_update(state, norm, CONFIG, norm)
    assert synchronized == [] and state[1] == 3


def test_a_factor_that_would_only_ever_lower_the_limit_is_refused() -> None:
    for factor in (0.5, 1.0, float("inf")):
        with pytest.raises(ValueError, match="factor"):
            AdaptiveClipConfig(factor=factor)
