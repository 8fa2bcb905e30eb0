"""Packing: which images share a pack.

Longest-pack-first histogram packing (Krell et al., arXiv 2107.02027; the packer of NiT) is the reference: lengths are
placed from the longest to the shortest, each into the fullest pack where it still fits. It works on the histogram of
lengths, so that its cost grows with the number of distinct lengths and not of images; concrete images are then dealt to
the packs. It fills well, but puts long images with long ones, and a step waits for its costliest pack. `balanced` fills
as well and gives the packs of a step equal work.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping

import numpy as np

from nitscale.errors import UserError
from nitscale.randomness import Key, permutation

Runs = tuple[tuple[int, int], ...]
"""A pack by its lengths, longest first: (length, how many images of it), …"""
Packer = Callable[[np.ndarray, int, int, int, int, tuple[Key, ...]], np.ndarray]
"""(lengths (n,), how many of them were left over before, token budget, steps, packs a step, key) → the place of each
image, (n,) int64: step · (packs a step) + pack, or -1 for one that is left over. What was left over before comes first
in `lengths` and is placed before all else. Every place gets an image if the lengths are together at most
steps · packs · budget, and more with the next image."""

WIDTH = 1152
"""Width D of the transformer (NiT-XL) that weighs linear work, 6 · D · n, against attention, n², in `work`."""
LONG = 1.6
"""`balanced` deals images longer than this many times the mean one by one; the others are alike in work."""
RESERVE = 0.12
"""Share of the budget that `balanced` leaves to the end, to be filled to the brim by best fit."""
FEW = 40
"""Where a pack has no more images than this on average, `balanced` deals all but the last of them one by one."""


def lpfhp(
    histogram: np.ndarray | Mapping[int, int], token_budget: int, max_segments: int | None = None
) -> tuple[list[list[int]], np.ndarray]:
    """Longest-pack-first packing of a histogram of lengths.

    `histogram` is an array whose entry i counts the images of i + 1 tokens, or a mapping from tokens to counts. Returns
    strategies (the ascending lengths of a pack) and how often each is used, (strategies,) int64. A pack has at most
    `max_segments` images, if that is given. UserError if a length exceeds `token_budget`.
    """
    if not isinstance(histogram, Mapping):
        histogram = {i + 1: int(count) for i, count in enumerate(histogram) if count}
    packs = lpfhp_runs(histogram, token_budget, max_segments)
    strategies = [[length for length, repeat in reversed(runs) for _ in range(repeat)] for _, runs in packs]
    return strategies, np.array([count for count, _ in packs], np.int64)


def work(lengths: np.ndarray) -> np.ndarray:
    """Work of images in multiply-adds, up to a factor: n² for attention and 6 · D · n for the rest."""
    return lengths * (lengths + 6 * WIDTH)


def pack_balanced(
    lengths: np.ndarray, carried: int, token_budget: int, steps: int, packs: int, key: tuple[Key, ...]
) -> np.ndarray:
    """A `Packer` that gives the packs of a step the same work, filled as by best fit.

    The longest images, one for each pack, are dealt in falling order to step after step, so that a step's longest are
    of one length. The other long ones go to random steps, in each the longest to the pack with the least work so far.
    The rest, images of about the mean length, fill the packs in the order in which they come, up to a reserve, and best
    fit closes the gaps. A step thus keeps a random mixture of sizes but for one image a pack.
    """
    places = np.full(len(lengths), -1, np.int64)
    free = np.full(steps * packs, token_budget, np.int64)
    load = np.zeros(steps * packs, np.int64)

    def put(images: np.ndarray, where: np.ndarray) -> None:
        fits = free[where] >= lengths[images]  # `where` names a pack once
        images, where = images[fits], where[fits]
        places[images] = where
        free[where] -= lengths[images]
        load[where] += work(lengths[images])

    scattered = permutation(len(free), *key, "carried")
    for start in range(0, carried, len(free)):
        images = np.arange(start, min(start + len(free), carried))
        put(images, scattered[: len(images)])
    falling = np.argsort(-lengths, kind="stable")
    falling = falling[places[falling] < 0]
    step_of, mean = np.arange(len(free)) // packs, lengths.mean()
    few = FEW * mean > token_budget
    for row in range(len(falling) // len(free)):
        images = falling[row * len(free) : (row + 1) * len(free)]
        if lengths[images[0]] <= LONG * mean and not (few and free.mean() > 2 * mean):
            break
        if row == 0 and not few:
            put(images, np.arange(len(free)))
        else:
            images = images[permutation(len(images), *key, "row", row)]
            put(images[np.lexsort((-lengths[images], step_of))], np.lexsort((load, step_of)))

    rest = np.flatnonzero(places < 0)
    # The packs laid end to end without their reserve, and the images beside them.
    ends = np.maximum(free - (token_budget if few else int(RESERVE * token_budget)), 0).cumsum()
    image_ends = lengths[rest].cumsum()
    where = np.searchsorted(ends, image_ends)
    inside = where < len(free)
    inside[inside] = (image_ends - lengths[rest])[inside] >= np.append(0, ends)[where[inside]]
    places[rest[inside]] = where[inside]
    free -= np.bincount(where[inside], lengths[rest[inside]], minlength=len(free)).astype(np.int64)
    rest = rest[~inside]
    best_fit(lengths, rest[np.argsort(-lengths[rest], kind="stable")], free, places)
    return places


def best_fit(lengths: np.ndarray, images: np.ndarray, free: np.ndarray, places: np.ndarray) -> None:
    """Put `images`, in this order, each into the fullest pack that has room; writes `places`, reads `free` tokens."""
    packs_with: dict[int, list[int]] = {}
    for pack, room in enumerate(free.tolist()):
        packs_with.setdefault(room, []).append(pack)
    rooms = sorted(packs_with)
    for image, length in zip(images.tolist(), lengths[images].tolist(), strict=True):
        if (fit := bisect_left(rooms, length)) == len(rooms):
            continue
        room = rooms[fit]
        places[image] = pack = packs_with[room].pop()
        if not packs_with[room]:
            del packs_with[room], rooms[fit]
        if room - length not in packs_with:
            packs_with[room - length] = []
            insort(rooms, room - length)
        packs_with[room - length].append(pack)


def pack_lpfhp(
    lengths: np.ndarray, carried: int, token_budget: int, steps: int, packs: int, key: tuple[Key, ...]
) -> np.ndarray:
    """A `Packer`: longest-pack-first, and the packs in random order. The emptiest packs too many are left over."""
    numbers = lpfhp_numbers(lengths, token_budget)
    tokens = np.bincount(numbers, lengths)
    waited = np.bincount(numbers[:carried], minlength=len(tokens)) > 0
    place_of = np.full(len(tokens), -1, np.int64)
    place_of[np.lexsort((-tokens, ~waited))[: steps * packs]] = permutation(steps * packs, *key, "packs")
    return place_of[numbers]


def lpfhp_numbers(lengths: np.ndarray, token_budget: int, max_segments: int | None = None) -> np.ndarray:
    """Deal images of these lengths, (n,) int64, to packs by `lpfhp`: the number of each image's pack, (n,) int64.

    Among images of one length, earlier ones go to earlier packs: shuffle `lengths` and the packs for a random
    composition. UserError if a length exceeds `token_budget`.
    """
    order = np.argsort(lengths, kind="stable")
    values, starts, counts = np.unique(lengths[order], return_index=True, return_counts=True)
    next_of = dict(zip(values.tolist(), starts.tolist(), strict=True))
    numbers = np.empty(len(lengths), np.int64)
    first = 0
    for count, runs in lpfhp_runs(dict(zip(values.tolist(), counts.tolist(), strict=True)), token_budget, max_segments):
        for length, repeat in runs:
            start = next_of[length]
            next_of[length] = start + count * repeat
            numbers[order[start : start + count * repeat]] = np.arange(first, first + count).repeat(repeat)
        first += count
    return numbers


def lpfhp_runs(
    histogram: Mapping[int, int], token_budget: int, max_segments: int | None = None
) -> list[tuple[int, Runs]]:
    """`lpfhp` with packs as runs of equal lengths: (how often the pack is used, its runs), …"""
    most = token_budget if max_segments is None else max_segments
    if token_budget < 1 or most < 1:
        raise UserError(f"packing: token_budget={token_budget} and max_segments={max_segments} must be at least 1")
    unfinished: dict[int, list[tuple[int, int, Runs]]] = {}  # free tokens → stack of (count, segments, runs)
    free_sizes: list[int] = []  # the keys of `unfinished`, sorted: the best fit is one bisection away
    finished: list[tuple[int, Runs]] = []

    def put(free: int, count: int, segments: int, runs: Runs) -> None:
        if free == 0 or segments == most:
            finished.append((count, runs))
            return
        if free not in unfinished:
            unfinished[free] = []
            insort(free_sizes, free)
        unfinished[free].append((count, segments, runs))

    for length in sorted(histogram, reverse=True):
        left = int(histogram[length])
        if not 1 <= length <= token_budget or left < 0:
            raise UserError(
                f"packing: {left} images of {length:,} tokens do not fit token_budget={token_budget}; "
                "raise data.token_budget or lower encode.max_tokens"
            )
        while left > 0:
            fit = bisect_left(free_sizes, length)
            if fit == len(free_sizes):  # fits nowhere: new packs, filled with this length
                repeat = min(token_budget // length, most, left)
                count = left // repeat
                put(token_budget - repeat * length, count, repeat, ((length, repeat),))
            else:
                free = free_sizes[fit]
                available, segments, runs = unfinished[free].pop()
                repeat = min(free // length, most - segments, left)
                count = min(available, left // repeat)
                if available > count:
                    unfinished[free].append((available - count, segments, runs))
                put(free - repeat * length, count, segments + repeat, (*runs, (length, repeat)))
                if not unfinished[free]:
                    del unfinished[free], free_sizes[bisect_left(free_sizes, free)]
            left -= count * repeat
    return finished + [(count, runs) for stack in unfinished.values() for count, _, runs in stack]


PACKERS: dict[str, Packer] = {"balanced": pack_balanced, "lpfhp": pack_lpfhp}
