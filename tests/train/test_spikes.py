"""Loss spikes: what is one and what is not; and what steps that are not finite trained on."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Plan, PlanConfig
from nitscale.train.spikes import SpikeConfig, SpikeDetector, write_nonfinite

CONFIG = SpikeConfig(threshold=6, patience=3, warmup=20, memory=50)
LOSSES = (1 + 0.1 * np.random.default_rng(0).standard_normal(200)).tolist()


def observe(detector: SpikeDetector, losses: list[float], start: int = 0) -> list[tuple[int, int]]:
    """(step, step at which the spike began) of every spike."""
    found = [(start + i, detector.observe(start + i, loss)) for i, loss in enumerate(losses)]
    return [(step, began) for step, began in found if began is not None]


def test_a_loss_that_stays_far_above_its_mean_is_a_spike_from_its_first_observation():
    assert observe(SpikeDetector(CONFIG), [*LOSSES, 3.0, 4.0, 5.0]) == [(202, 200)]


def test_noise_single_outliers_and_slow_drift_are_no_spikes():
    drifting = [loss + 0.01 * i for i, loss in enumerate(LOSSES)]
    outliers = [5.0 if i % 10 == 9 else loss for i, loss in enumerate(LOSSES)]
    for losses in (LOSSES, drifting, outliers):
        assert observe(SpikeDetector(CONFIG), losses) == []


def test_a_spike_within_the_warm_up_is_none_and_without_a_threshold_there_are_none():
    assert observe(SpikeDetector(CONFIG), [*LOSSES[:10], 3.0, 4.0, 5.0]) == []
    assert observe(SpikeDetector(SpikeConfig()), [*LOSSES, 3.0, 4.0, 5.0]) == []


def test_mean_and_variance_are_plain_ones_until_memory_is_full():
    detector = SpikeDetector(CONFIG)
    observe(detector, LOSSES[:50])
    assert detector.state.mean == pytest.approx(np.mean(LOSSES[:50]))
    assert detector.state.variance == pytest.approx(np.var(LOSSES[:50]))


def test_what_is_not_finite_is_passed_over():
    detector = SpikeDetector(CONFIG)
    observe(detector, LOSSES)
    before = detector.state
    assert observe(detector, [math.nan, math.inf, None]) == []  # type: ignore[list-item]
    assert detector.state == before


def test_spikes_do_not_enter_the_mean_and_rewinds_have_an_end():
    detector = SpikeDetector(replace(CONFIG, most_rewinds=2))
    observe(detector, LOSSES)
    mean = detector.state.mean
    assert observe(detector, [5.0] * 6, start=200) == [(202, 200), (205, 203)]
    assert detector.state.mean == mean
    assert observe(detector, [5.0] * 6, start=206) == []
    assert detector.state.mean > mean


def test_a_resumed_detector_gives_the_same_answers():
    whole, first, second = SpikeDetector(CONFIG), SpikeDetector(CONFIG), SpikeDetector(CONFIG)
    losses = [*LOSSES, 3.0, 4.0, 5.0, *LOSSES]
    expected = observe(whole, losses)
    found = observe(first, losses[:201])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += observe(second, losses[201:], start=201)
    assert found == expected == [(202, 200)]
    assert second.state == whole.state


def test_steps_that_were_not_finite_are_listed_with_their_samples_and_keys(shapes_dataset: Path, tmp_path: Path):
    dataset = load_dataset(shapes_dataset)
    plan = Plan(dataset, PlanConfig(seed=0, token_budget=64, packs_per_step=2))
    first, state = plan.step(plan.start())
    second, _ = plan.step(state)
    write_nonfinite(tmp_path / "nonfinite.json", [*first, *second], dataset.index)
    packs = json.loads((tmp_path / "nonfinite.json").read_text())
    assert [(pack["step"], pack["pack"]) for pack in packs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for pack, planned in zip(packs, [*first, *second], strict=True):
        assert pack["samples"] == planned.sample_ids.tolist() and pack["flips"] == planned.flips.tolist()
        assert pack["keys"] == [dataset.index.key(sample) for sample in pack["samples"]]
    assert len({key for pack in packs for key in pack["keys"]}) > 10
