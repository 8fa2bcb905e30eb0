import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from nitscale.data.forecast import forecast
from nitscale.data.manifest import load_dataset
from nitscale.data.packing import PACKERS
from nitscale.data.plan import Plan, PlanConfig
from nitscale.errors import UserError
from tests.data.test_plan import fake_dataset

CONFIG = PlanConfig(seed=3, token_budget=64, packs_per_step=8, lanes=2, block_samples=100)


def measured(plan, rounds, world_size):
    """Fill, imbalance and entropy by the packs that the trainer would see, written out plainly."""
    fill, imbalance, entropy = [], [], []
    state = plan.start()
    for _ in range(rounds * plan.round_steps):
        packs, state = plan.step(state)
        fill += [pack.num_tokens / 64 for pack in packs]
        loads = [sum(pack.cost for pack in rank) for rank in plan.assign(packs, world_size)]
        imbalance.append(max(loads) * world_size / sum(loads))
        sizes = Counter(tuple(grid) for pack in packs for grid in pack.grids.tolist())
        entropy.append(-sum(n / sizes.total() * math.log(n / sizes.total()) for n in sizes.values()))
    return np.mean(fill), np.mean(imbalance), np.mean(entropy)


@pytest.mark.parametrize("packer", ["balanced", "lpfhp"])
def test_the_forecast_is_what_the_steps_turn_out_to_be(packer):
    dataset = fake_dataset((400,) * 6)
    plan = Plan(dataset, replace(CONFIG, packer=packer))
    report = forecast(dataset, plan.config, world_size=4)
    rounds = round(report["tokens"] / (8 * 64) / plan.round_steps)
    fill, imbalance, entropy = measured(plan, rounds, 4)
    assert report["fill"] == pytest.approx(fill, abs=1e-5)
    assert report["imbalance"] == pytest.approx(imbalance, abs=1e-5)
    assert report["packs"] == math.ceil(report["tokens"] / 64 / fill)
    assert report["steps"] == math.ceil(report["packs"] / 8)
    assert 0.5 < report["entropy"] < 1.05
    assert entropy < math.log(25)


def test_sorting_images_into_steps_shows_in_the_entropy(monkeypatch):
    def sorted_by_length(lengths, carried, token_budget, steps, packs, key):
        places = np.empty(len(lengths), np.int64)
        places[np.argsort(lengths)] = np.arange(len(lengths)) * steps * packs // len(lengths)
        return places

    dataset = fake_dataset((400,) * 6)
    monkeypatch.setitem(PACKERS, "balanced", sorted_by_length)
    assert forecast(dataset, CONFIG, 4)["entropy"] < 0.5


def test_a_node_fetches_the_shards_of_its_lanes_only(shapes_dataset):
    dataset = load_dataset(shapes_dataset)
    total = sum(shard["bytes"] for shard in dataset.manifest.shards) / 1e9
    config = PlanConfig(seed=0, token_budget=128, packs_per_step=4, lanes=4, block_samples=16)
    apart = forecast(dataset, config, world_size=4, ranks_per_node=1)
    together = forecast(dataset, replace(config, lanes=1), world_size=4, ranks_per_node=1)
    assert apart["nodes"] == together["nodes"] == 4
    assert apart["gets"] < together["gets"]
    assert together["cache_gb"] == pytest.approx(total, abs=1e-3)


def test_a_world_size_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="use one of 1, 2, 4, 8 ranks"):
        forecast(fake_dataset(), CONFIG, world_size=3)
