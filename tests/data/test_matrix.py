"""Exact and elastic: whatever the number of ranks and workers, and wherever a run is stopped and goes on with more or
fewer of them, the same images meet the same flips and noise in the same step."""

from itertools import islice

import numpy as np
import pytest

from nitscale.data.digest import digests, step_digest
from nitscale.data.loader import PackLoader
from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Pack, Plan, PlanConfig
from nitscale.randomness import key_digest

CONFIG = PlanConfig(seed=5, token_budget=24, packs_per_step=8, lanes=2, block_samples=20)
STEPS = 6
"""More than an epoch and a half."""


@pytest.fixture(scope="module")
def dataset(shapes_dataset):
    return load_dataset(shapes_dataset)


@pytest.fixture(scope="module")
def expected(dataset):
    plan = Plan(dataset, CONFIG)
    assert CONFIG.packs_per_step * CONFIG.token_budget * STEPS > 1.5 * dataset.manifest.tokens
    return [digest for _, digest, _ in digests(plan, plan.start(), STEPS)]


def read(dataset, first, last, world_size, workers):
    """Digests of steps first..last-1 by what the loaders of all ranks bring, each from a state saved as JSON."""
    per_rank = (last - first) * CONFIG.packs_per_step // world_size
    packs = []
    for rank in range(world_size):
        plan = Plan(dataset, CONFIG)
        state = plan.load_state(plan.state_dict(plan.state_at(first)))
        batches = iter(PackLoader(dataset, plan, state, rank, world_size, workers))
        packs += [as_pack(batch) for batch in islice(batches, per_rank)]
        batches.close()
    assert len(packs) == (last - first) * CONFIG.packs_per_step
    return [step_digest([pack for pack in packs if pack.step == step]).hex() for step in range(first, last)]


def as_pack(batch):
    """What a batch says of itself, with the key that the trainer makes of its step and position."""
    key = key_digest(CONFIG.seed, "noise", batch.step, batch.pack)
    return Pack(
        batch.step, batch.pack, np.array(batch.sample_ids), batch.layout.grids.numpy(), np.array(batch.flips), key
    )


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_from_every_step_on_all_ranks_and_workers_see_the_same(dataset, expected, world_size, workers):
    assert read(dataset, 0, STEPS, world_size, workers) == expected
    for first in range(1, STEPS):
        assert read(dataset, first, min(first + 2, STEPS), world_size, workers) == expected[first : first + 2]


@pytest.mark.parametrize("sizes", [(1, 8), (8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_that_shrinks_or_grows_in_the_middle_goes_on_the_same(dataset, expected, sizes, stop):
    assert read(dataset, 0, stop, sizes[0], 0) + read(dataset, stop, STEPS, sizes[1], 0) == expected
