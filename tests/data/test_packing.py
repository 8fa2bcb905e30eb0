import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitscale.data.packing import PACKERS, best_fit, lpfhp, lpfhp_numbers, work
from nitscale.errors import UserError

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "packing.json").read_text())["cases"]


@pytest.mark.parametrize("name", GOLDENS)
def test_packs_are_those_of_the_published_packer(name):
    golden = GOLDENS[name]
    strategies, counts = lpfhp(dict(golden["histogram"]), golden["token_budget"], golden["max_segments"])
    theirs: Counter[tuple[int, ...]] = Counter()
    for runs, count in zip(golden["strategies"], golden["counts"], strict=True):
        theirs[tuple(length for length, repeat in runs for _ in range(repeat))] += count
    ours: Counter[tuple[int, ...]] = Counter()
    for strategy, count in zip(strategies, counts.tolist(), strict=True):
        ours[tuple(strategy)] += count
    assert ours == theirs
    assert counts.sum() == golden["packs"]


def test_an_array_and_a_mapping_are_the_same_histogram():
    array = np.array([3, 0, 2, 1])
    by_array, by_mapping = lpfhp(array, 6), lpfhp({1: 3, 3: 2, 4: 1}, 6)
    assert by_array[0] == by_mapping[0]
    assert by_array[1].tolist() == by_mapping[1].tolist()


def pack_lengths(lengths, *limits):
    """The positions of each pack's images."""
    numbers = lpfhp_numbers(lengths, *limits)
    return [np.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=200),
    slack=st.integers(0, 60),
    max_segments=st.none() | st.integers(1, 5),
)
def test_every_image_is_in_exactly_one_pack_and_no_pack_is_over_budget(lengths, slack, max_segments):
    lengths = np.array(lengths)
    budget = int(lengths.max()) + slack
    packs = pack_lengths(lengths, budget, max_segments)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    assert all(lengths[pack].sum() <= budget for pack in packs)
    assert all(len(pack) <= (max_segments or budget) for pack in packs)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=100), budget=st.integers(40, 100))
def test_dealing_images_gives_the_packs_of_the_histogram(lengths, budget):
    strategies, counts = lpfhp(Counter(lengths), budget)
    from_histogram = Counter({tuple(s): 0 for s in strategies})
    for strategy, count in zip(strategies, counts.tolist(), strict=True):
        from_histogram[tuple(strategy)] += count
    dealt = Counter(tuple(sorted(np.array(lengths)[pack].tolist())) for pack in pack_lengths(np.array(lengths), budget))
    assert dealt == from_histogram


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=100))
def test_two_packs_that_are_not_full_never_fit_together_into_one(lengths):
    packs = pack_lengths(np.array(lengths), 30)
    totals = sorted(int(np.array(lengths)[pack].sum()) for pack in packs)
    assert len(totals) < 2 or totals[0] + totals[1] > 30


def test_blocks_of_typical_images_are_packed_nearly_without_gaps():
    lengths = np.random.default_rng(0).lognormal(5.1, 0.6, 16384).astype(int).clip(1, 4096)
    packs = pack_lengths(lengths, 16384)
    assert lengths.sum() / (len(packs) * 16384) > 0.995


@pytest.mark.parametrize("pack", [lambda: lpfhp({5120: 1}, 4096), lambda: pack_lengths(np.array([7, 5120]), 4096)])
def test_an_image_longer_than_the_budget_is_refused_with_the_way_out(pack):
    with pytest.raises(UserError, match=r"5,120 tokens do not fit token_budget=4096; raise data.token_budget"):
        pack()


@pytest.mark.parametrize(("budget", "max_segments"), [(0, None), (8, 0)])
def test_impossible_limits_are_refused(budget, max_segments):
    with pytest.raises(UserError, match="at least 1"):
        lpfhp({1: 1}, budget, max_segments)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=300, max_size=300),
    carried=st.integers(0, 5),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    packer=st.sampled_from(list(PACKERS)),
)
def test_every_pack_of_every_step_gets_images_and_none_too_many(sizes, carried, shape, packer):
    num_packs = shape[0] * shape[1]
    lengths = np.array(sizes)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), num_packs * 40, side="right")]
    carried = min(carried, num_packs, len(lengths))
    places = PACKERS[packer](lengths, carried, 40, *shape, (0,))
    tokens = np.bincount(places[places >= 0], lengths[places >= 0], minlength=num_packs)
    assert places.min() >= -1
    assert len(tokens) == num_packs
    assert tokens.min() > 0
    assert tokens.max() <= 40
    assert packer == "lpfhp" or (places[:carried] >= 0).all()
    assert (PACKERS[packer](lengths, carried, 40, *shape, (0,)) == places).all()
    left = lengths[places < 0]
    assert packer == "lpfhp" or not len(left) or left.min() > 40 - tokens.min()


def test_best_fit_puts_an_image_where_it_leaves_least():
    places = np.full(4, -1)
    best_fit(np.array([5, 3, 9, 1]), np.array([0, 1, 2, 3]), np.array([8, 6, 5, 3]), places)
    assert places.tolist() == [2, 3, -1, 1]


def test_balanced_packs_of_a_step_cost_the_same():
    rng = np.random.default_rng(1)
    lengths = np.where(rng.random(12000) < 0.01, rng.integers(900, 4096, 12000), rng.integers(5, 250, 12000))
    lengths = lengths[: np.searchsorted(lengths.cumsum(), 10 * 8 * 16384, side="right")]
    imbalance = {}
    for packer in PACKERS:
        places = PACKERS[packer](lengths, 0, 16384, 10, 8, (0,))
        costs = np.bincount(places[places >= 0], work(lengths[places >= 0]), minlength=80).reshape(10, 8)
        imbalance[packer] = (costs.max(axis=1) / costs.mean(axis=1)).mean()
    assert imbalance["balanced"] < 1.01 < 1.1 < imbalance["lpfhp"]
