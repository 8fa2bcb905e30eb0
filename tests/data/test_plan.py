import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale.data.index import DatasetIndex
from nitscale.data.manifest import Dataset, Manifest
from nitscale.data.plan import Pack, Plan, PlanConfig, chain_digest, step_digest
from nitscale.errors import UserError
from nitscale.randomness import random_words

CONFIG = PlanConfig(seed=3, token_budget=64, packs_per_step=4, lanes=2, block_samples=25)


class Keys(DatasetIndex):
    """An index without files behind it."""

    def key(self, sample_id: int) -> str:
        return f"image-{sample_id}"


def fake_dataset(shard_sizes=(30, 17, 25, 40, 9), seed=0, longest=5, flips=True) -> Dataset:
    """A dataset with an index and nothing else: grids of up to `longest` rows and columns."""
    samples = sum(shard_sizes)
    words = random_words(2 * samples, "sizes", seed) % np.uint64(longest)
    rows, columns = words.astype(np.int32).reshape(2, samples) + 1
    zeros = np.zeros(samples, np.int64)
    names = tuple(f"{i:06d}" for i in range(len(shard_sizes)))
    starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    index = Keys(names, starts, zeros, rows, columns, zeros, zeros, zeros[:, None], {}, names, None)  # type: ignore[arg-type]
    shards = [{"tar": name, "samples": size} for name, size in zip(names, shard_sizes, strict=True)]
    manifest = Manifest({"id": "dct"}, "float16", flips, ["a"], samples, int((rows * columns).sum()), {}, shards)
    return Dataset(manifest, index, None)  # type: ignore[arg-type]


def steps(plan, state=None):
    """(state, packs) of one step after the other."""
    state = state or plan.start()
    while True:
        packs, after = plan.step(state)
        yield state, packs
        state = after


def identity(packs):
    return [(p.step, p.pack, p.sample_ids.tolist(), p.flips.tolist(), p.grids.tolist(), p.noise_key) for p in packs]


def lane_stream(plan, lane, epochs):
    """Sample ids of a lane in each of the first epochs, in order."""
    ids = [[] for _ in range(epochs + 1)]
    cursor = (0, 0, 0)
    while cursor[0] < epochs:
        pack, after = plan._next_pack(lane, cursor)
        ids[cursor[0]] += pack.tolist()
        cursor = after
    return ids[:epochs]


@settings(max_examples=40, deadline=None)
@given(
    shard_sizes=st.lists(st.integers(1, 40), min_size=3, max_size=8),
    lanes=st.sampled_from([1, 2, 3]),
    block_samples=st.integers(1, 60),
    seed=st.integers(0, 5),
)
def test_every_sample_is_seen_exactly_once_an_epoch(shard_sizes, lanes, block_samples, seed):
    config = replace(CONFIG, seed=seed, lanes=lanes, packs_per_step=2 * lanes, block_samples=block_samples)
    plan = Plan(fake_dataset(shard_sizes), config)
    streams = [lane_stream(plan, lane, 3) for lane in range(lanes)]
    for epoch in range(3):
        seen = [i for stream in streams for i in stream[epoch]]
        assert sorted(seen) == list(range(sum(shard_sizes)))


def test_steps_walk_the_lanes_streams_without_gaps_or_short_steps():
    plan = Plan(fake_dataset(), CONFIG)
    seen = [[], []]
    for _, packs in islice(steps(plan), 60):
        assert [p.pack for p in packs] == [0, 1, 2, 3]
        for pack in packs:
            assert pack.num_tokens <= 64
            seen[pack.pack // 2] += pack.sample_ids.tolist()
    for lane in range(2):
        stream = [i for epoch in lane_stream(plan, lane, 30) for i in epoch]
        assert len(seen[lane]) > 3 * 121  # several epochs
        assert seen[lane] == stream[: len(seen[lane])]


def test_every_step_can_be_resumed_from_its_state_alone():
    dataset = fake_dataset()
    walked = list(islice(steps(Plan(dataset, CONFIG)), 40))
    for state, packs in walked:
        plan = Plan(dataset, CONFIG)
        saved = json.loads(json.dumps(plan.state_dict(state)))
        resumed, _ = plan.step(plan.load_state(saved))
        assert identity(resumed) == identity(packs)


def test_a_step_can_be_asked_for_twice():
    plan = Plan(fake_dataset(), CONFIG)
    state, packs = next(islice(steps(plan), 30, None))
    assert identity(plan.step(state)[0]) == identity(packs)


def test_grids_are_those_of_the_index_over_the_patch_size():
    dataset = fake_dataset()
    dataset.index.rows[:] *= 2
    dataset.index.columns[:] *= 2
    plan = Plan(dataset, replace(CONFIG, patch_size=2))
    for pack in plan.step(plan.start())[0]:
        assert pack.grids[:, 0].tolist() == (dataset.index.rows[pack.sample_ids] // 2).tolist()
        assert pack.grids[:, 1].tolist() == (dataset.index.columns[pack.sample_ids] // 2).tolist()


def test_epochs_differ_in_order_and_in_packs():
    first, second = lane_stream(Plan(fake_dataset(), CONFIG), 0, 2)
    assert first != second


def test_about_half_of_the_images_are_mirrored_and_none_if_so_configured():
    def flips(**change):
        plan = Plan(fake_dataset(), replace(CONFIG, **change))
        return np.concatenate([p.flips for _, packs in islice(steps(plan), 50) for p in packs])

    assert 0.4 < flips().mean() < 0.6
    assert not flips(flip_probability=0.0).any()
    assert flips(flip_probability=1.0).all()


@pytest.mark.parametrize("change", [{"seed": 4}, {"token_budget": 65}, {"block_samples": 30}, {"lanes": 1}])
def test_the_data_digest_differs_under_another_plan(change):
    def digest(config):
        plan, text = Plan(fake_dataset(), config), ""
        for _, packs in islice(steps(plan), 5):
            text = chain_digest(text, packs)
        return text

    assert digest(CONFIG) == digest(CONFIG)
    assert digest(CONFIG) != digest(replace(CONFIG, **change))


def test_the_digest_of_a_step_covers_ids_flips_and_noise_and_no_assignment():
    plan = Plan(fake_dataset(), CONFIG)
    packs, _ = plan.step(plan.start())
    digest = step_digest(packs)
    assert step_digest(packs[::-1]) == digest
    assert step_digest([p for rank in plan.assign(packs, 2) for p in rank]) == digest
    for change in (
        {"flips": ~packs[1].flips},
        {"sample_ids": packs[1].sample_ids + 1},
        {"noise_key": packs[1].noise_key ^ 1},
        {"step": 1},
    ):
        assert step_digest([packs[0], replace(packs[1], **change), *packs[2:]]) != digest


def test_the_order_of_data_never_changes_between_versions():
    """Old checkpoints must find their data: if this fails, the plan needs a new version."""
    plan, text = Plan(fake_dataset(), CONFIG), ""
    for _, packs in islice(steps(plan), 20):
        text = chain_digest(text, packs)
    assert text == "e7e62cf48947085e62364026d238e0e01ea0dad0c053299de89d837a7a4a3ab2"


def pack_of(position, *lengths):
    grids = np.array([(1, n) for n in lengths])
    return Pack(0, position, np.arange(len(lengths)), grids, np.zeros(len(lengths), bool), 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_every_rank_gets_as_many_packs_and_every_pack_goes_to_one_rank(world_size):
    plan = Plan(fake_dataset(), replace(CONFIG, packs_per_step=12))
    packs, _ = plan.step(plan.start())
    ranks = plan.assign(packs, world_size)
    assert [len(rank) for rank in ranks] == [12 // world_size] * world_size
    assert sorted(p.pack for rank in ranks for p in rank) == list(range(12))
    assert [[p.pack for p in rank] for rank in ranks] == [
        [p.pack for p in rank] for rank in plan.assign(packs, world_size)
    ]


def test_costly_packs_are_spread_over_the_ranks():
    plan = Plan(fake_dataset(), CONFIG)
    packs = [pack_of(0, 9000), pack_of(1, *[90] * 100), pack_of(2, 9000), pack_of(3, *[90] * 100)]
    assert packs[0].cost > packs[1].cost
    ranks = plan.assign(packs, 2)
    assert [[p.pack for p in rank] for rank in ranks] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("world_size", [0, 3, 5, 8])
def test_a_world_size_that_does_not_divide_the_step_is_refused_with_those_that_do(world_size):
    plan = Plan(fake_dataset(), CONFIG)
    with pytest.raises(UserError, match="use one of 1, 2, 4 ranks"):
        plan.assign(plan.step(plan.start())[0], world_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 9}, "seed is 9, was 3"),
        ({"token_budget": 128}, "token_budget is 128, was 64"),
        ({"lanes": 4}, "lanes is 4, was 2"),
        ({"packs_per_step": 8}, "packs_per_step is 8, was 4"),
    ],
)
def test_state_saved_under_another_plan_is_refused_with_both_values(change, message):
    dataset = fake_dataset()
    saved = Plan(dataset, CONFIG).state_dict(Plan(dataset, CONFIG).start())
    with pytest.raises(UserError, match=message):
        Plan(dataset, replace(CONFIG, **change)).load_state(saved)


def test_state_saved_for_another_dataset_is_refused():
    plan = Plan(fake_dataset(), CONFIG)
    with pytest.raises(UserError, match="manifest is '"):
        Plan(fake_dataset(seed=1, shard_sizes=(50, 50)), CONFIG).load_state(plan.state_dict(plan.start()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_budget": 24}, r"image 'image-\d+' has 25 tokens, more than token_budget=24; raise data.token_budget"),
        ({"lanes": 3}, "lanes=3 must divide packs_per_step=4"),
        ({"lanes": 8, "packs_per_step": 8}, "lanes=8 but the dataset has 5 shards"),
        ({"patch_size": 2}, r"image 'image-\d+' has a latent of . x ., which patch_size=2 does not divide"),
        ({"packer": "magic"}, "unknown data.packer 'magic'"),
        ({"flip_probability": 1.5}, "must lie in 0..1"),
        ({"packs_per_step": 0}, "packs_per_step must be at least 1"),
        ({"block_samples": 0}, "block_samples must be at least 1"),
    ],
)
def test_an_impossible_plan_is_refused_at_once(change, message):
    with pytest.raises(UserError, match=message):
        Plan(fake_dataset(), replace(CONFIG, **change))


def test_mirror_images_need_mirrored_latents():
    with pytest.raises(UserError, match="flip_probability=0"):
        Plan(fake_dataset(flips=False), CONFIG)


def test_resuming_late_costs_a_block_and_not_a_walk_through_the_epochs(monkeypatch):
    plan = Plan(fake_dataset(), CONFIG)
    made = []
    make = plan._pack_block
    monkeypatch.setattr(plan, "_pack_block", lambda *key: made.append(key) or make(*key))
    plan.step(replace(plan.start(), step=10**6, cursors=((5000, 1, 0), (4999, 0, 2))))
    assert made == [(0, 5000, 1), (1, 4999, 0)]
