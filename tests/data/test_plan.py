import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale.data.digest import chain_digest, digests, step_digest
from nitscale.data.index import DatasetIndex
from nitscale.data.manifest import Dataset, Manifest
from nitscale.data.plan import Cursor, Pack, Plan, PlanConfig, PlanState, share_out
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


def epochs_of(plan, lane, count):
    """A lane's samples in each of the first epochs, in order."""
    epochs = [[]]
    for part, ends in plan._stream(lane, 0, 0):
        epochs[-1] += part.tolist()
        if ends and len(epochs) == count:
            return epochs
        epochs += [[]] * ends


plans = st.builds(
    lambda shard_sizes, lanes, per_lane, **options: Plan(
        fake_dataset(shard_sizes), replace(CONFIG, lanes=lanes, packs_per_step=per_lane * lanes, **options)
    ),
    shard_sizes=st.lists(st.integers(1, 40), min_size=3, max_size=8),
    lanes=st.sampled_from([1, 2, 3]),
    per_lane=st.integers(1, 3),
    block_samples=st.integers(1, 60),
    packer=st.sampled_from(["balanced", "lpfhp"]),
    seed=st.integers(0, 5),
)


@settings(max_examples=40, deadline=None)
@given(plans)
def test_the_lanes_streams_hold_every_sample_once_an_epoch(plan):
    streams = [epochs_of(plan, lane, 3) for lane in range(plan.config.lanes)]
    for epoch in range(3):
        assert sorted(i for stream in streams for i in stream[epoch]) == list(range(plan._index.num_samples))


@settings(max_examples=40, deadline=None)
@given(plans)
def test_steps_take_the_streams_in_order_without_loss_or_repetition(plan):
    config, seen, state = plan.config, [Counter() for _ in range(plan.config.lanes)], plan.start()
    for _ in range(3 * plan.round_steps):
        packs, state = plan.step(state)
        assert [pack.pack for pack in packs] == list(range(config.packs_per_step))
        for pack in packs:
            assert 0 < pack.num_tokens <= config.token_budget
            seen[pack.pack * config.lanes // config.packs_per_step].update(pack.sample_ids.tolist())
    for lane, (epoch, position, carried) in enumerate(state.cursors):
        epochs = epochs_of(plan, lane, epoch + 1)
        behind = Counter(i for ids in epochs[:-1] for i in ids) + Counter(epochs[-1][:position])
        assert behind == seen[lane] + Counter(carried)


def test_what_was_carried_is_packed_in_the_next_round():
    for packer in ("balanced", "lpfhp"):
        plan = Plan(fake_dataset(), replace(CONFIG, packer=packer, lanes=1, block_samples=10))
        state, carried = plan.start(), ()
        for _ in range(20):
            seen = Counter()
            for _ in range(plan.round_steps):
                packs, state = plan.step(state)
                seen.update(i for pack in packs for i in pack.sample_ids.tolist())
            assert not Counter(carried) - seen
            carried = state.cursors[0].carried


def test_any_step_can_be_found_without_walking_there():
    plan = Plan(fake_dataset(), CONFIG)
    for number, (state, _) in enumerate(islice(steps(plan), 40)):
        assert plan.state_at(number) == state


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


def test_epochs_differ_in_order():
    first, second = epochs_of(Plan(fake_dataset(), replace(CONFIG, lanes=1)), 0, 2)
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


def test_digests_are_those_of_the_steps_from_any_state_on():
    plan = Plan(fake_dataset(), CONFIG)
    whole = list(digests(plan, plan.start(), 20))
    assert whole[7][0] == 7
    assert whole[7][1] == step_digest(plan.step(plan.state_at(7))[0]).hex()
    assert list(digests(plan, plan.state_at(12), 8, whole[11][2])) == whole[12:]


def test_the_order_of_data_never_changes_between_versions():
    """Old checkpoints must find their data: if this fails, the plan needs a new version."""
    plan, text = Plan(fake_dataset(), CONFIG), ""
    for _, packs in islice(steps(plan), 20):
        text = chain_digest(text, packs)
    assert text == "48fa1d36daf74e50523fb059ec581651b489a956f0af051d5b9b2392cd0a67df"


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


def test_resuming_late_costs_a_round_and_not_a_walk_through_the_epochs(monkeypatch):
    plan = Plan(fake_dataset(), CONFIG)
    made = []
    make = plan._share
    monkeypatch.setattr(plan, "_share", lambda *key: made.append(key) or make(*key))
    cursors = (Cursor(5000, 20, (3,)), Cursor(4999, 0))
    plan.step(PlanState(10**6, cursors))
    assert made == [(0, 10**6 // plan.round_steps, cursors[0]), (1, 10**6 // plan.round_steps, cursors[1])]


def test_a_rank_reads_from_as_few_lanes_as_can_be():
    costs = [5, 1, 4, 2, 8, 7, 3, 6]
    assert share_out(costs, lanes=4, world_size=4) == [[0, 1], [2, 3], [4, 5], [7, 6]]
    assert share_out(costs, lanes=4, world_size=8) == [[0], [1], [2], [3], [4], [5], [7], [6]]
    assert share_out(costs, lanes=4, world_size=2) == [[0, 2, 3, 1], [4, 5, 7, 6]]
    assert share_out(costs, lanes=1, world_size=4) == [[4, 1], [5, 3], [7, 6], [0, 2]]


def test_a_plan_of_typical_images_is_full_even_and_mixed():
    """The shape of ImageNet's lengths: most images alike, some small, one in a hundred many times as long."""
    rng = np.random.default_rng(0)
    sides = rng.integers(10, 16, (2, 120_000))
    sides[:, :6000] = rng.integers(1, 10, (2, 6000))
    sides[:, 6000:7200] = rng.integers(30, 65, (2, 1200))
    dataset = fake_dataset((2000,) * 60)
    dataset.index.rows[:], dataset.index.columns[:] = sides[:, rng.permutation(120_000)]
    for lanes, bound in ((1, 1.01), (16, 1.03)):
        measured = {}
        for packer in ("balanced", "lpfhp"):
            plan = Plan(dataset, PlanConfig(0, 16384, 16, lanes, 10_000, packer=packer))
            packs = [packs for _, packs in islice(steps(plan), plan.round_steps)]
            fill = np.mean([p.num_tokens for step in packs for p in step]) / 16384
            measured[packer] = fill, np.mean([max(p.cost for p in s) / np.mean([p.cost for p in s]) for s in packs])
        assert measured["balanced"][0] > 0.998
        assert measured["balanced"][1] < bound < 1.1 < measured["lpfhp"][1]
