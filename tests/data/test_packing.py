import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitscale.data.packing import lpfhp, pack_lengths
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
