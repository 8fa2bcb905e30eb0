"""Packing: which images share a pack.

Longest-pack-first histogram packing (Krell et al., arXiv 2107.02027; the packer of NiT): lengths are placed from the
longest to the shortest, each into the fullest pack where it still fits. It works on the histogram of lengths, so that
its cost grows with the number of distinct lengths and not of images; concrete images are then dealt to the packs.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping

import numpy as np

from nitscale.errors import UserError

Runs = tuple[tuple[int, int], ...]
"""A pack by its lengths, longest first: (length, how many images of it), …"""


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


def pack_lengths(lengths: np.ndarray, token_budget: int, max_segments: int | None = None) -> list[np.ndarray]:
    """Deal images of these lengths, (n,) int64, to packs; a pack is the positions of its images in `lengths`.

    Every position is in exactly one pack. Among images of one length, earlier ones go to earlier packs: shuffle
    `lengths` and the packs for a random composition. UserError if a length exceeds `token_budget`.
    """
    lengths = np.asarray(lengths)
    values, starts, counts = np.unique(np.sort(lengths), return_index=True, return_counts=True)
    order = np.argsort(lengths, kind="stable")
    next_of = dict(zip(values.tolist(), starts.tolist(), strict=True))
    packs = []
    for count, runs in lpfhp_runs(dict(zip(values.tolist(), counts.tolist(), strict=True)), token_budget, max_segments):
        for _ in range(count):
            parts = []
            for length, repeat in runs:
                start = next_of[length]
                parts.append(order[start : start + repeat])
                next_of[length] = start + repeat
            packs.append(np.concatenate(parts))
    return packs


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
