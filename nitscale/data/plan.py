"""The plan: which images meet in which pack of which step. A pure function of (dataset, PlanConfig, state).

A dataset's shards are permuted every epoch, keyed by (seed, epoch), and dealt to lanes. A lane's samples are cut into
blocks, and a block is shuffled, keyed by (seed, epoch, lane, block): a lane is one endless stream of samples, in which
epoch follows epoch. Steps are packed in rounds of a fixed number of steps: from every lane as many images as fill its
share of the packs, and the few that do not fit are carried into the next round, so that no pack is left half empty.
The lanes agree on the order of a round's steps, so that their costly packs meet.

The state is a step and a cursor for each lane at the beginning of the step's round; any step costs one round and not a
walk through the epochs. Nothing depends on the number of processes or workers: they only share out a step's packs.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from nitscale.data.manifest import Dataset
from nitscale.data.packing import PACKERS, work
from nitscale.errors import UserError
from nitscale.randomness import bernoulli, key_digest, permutation

STATE_VERSION = 2
FEWEST_STEPS = 16
"""Steps of a round, unless an epoch has fewer: costly images are gathered in some of them."""


@dataclass(frozen=True)
class PlanConfig:
    """What the data order depends on, beside the dataset."""

    seed: int
    token_budget: int
    """Most tokens of a pack."""
    packs_per_step: int
    """Packs of one optimizer step over all ranks."""
    lanes: int = 1
    """Independent sample streams; divides `packs_per_step`, and a dataset has at least as many shards."""
    block_samples: int = 65536
    """Fewest samples of a block, which is shuffled together; a lane with fewer is one block. Also about the samples
    of a lane that are packed together."""
    patch_size: int = 1
    """Latent cells of one token's side."""
    packer: str = "balanced"
    """A name in `packing.PACKERS`."""
    flip_probability: float = 0.5


@dataclass(frozen=True, eq=False)
class Pack:
    """One pack of a step: the images, and the keys of its randomness."""

    step: int
    pack: int
    """Position in the step, 0..packs_per_step-1."""
    sample_ids: np.ndarray
    """(n,) int64."""
    grids: np.ndarray
    """(n, 2) int64: (rows, columns) of tokens."""
    flips: np.ndarray
    """(n,) bool: whether the mirror image is taken."""
    noise_key: int
    """key_digest(seed, "noise", step, pack): seeds whatever noise the pack meets."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each image."""
        return self.grids[:, 0] * self.grids[:, 1]

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def cost(self) -> int:
        """Work of the pack, see `packing.work`."""
        return int(work(self.lengths).sum())


class Cursor(NamedTuple):
    """Where a lane's stream stands."""

    epoch: int
    position: int
    """Samples of the lane's epoch that are behind."""
    carried: tuple[int, ...] = ()
    """Sample ids that are behind in the stream and did not fit into a pack yet."""


@dataclass(frozen=True)
class PlanState:
    """Where the plan stands: everything that resuming needs."""

    step: int
    cursors: tuple[Cursor, ...]
    """One a lane, at the beginning of the step's round."""


class Share(NamedTuple):
    """One lane's packs of a round."""

    sample_ids: np.ndarray
    """In the order of their place: step · (packs a step) + pack."""
    starts: np.ndarray
    """The first of each place in `sample_ids`, and the number of samples."""


@dataclass(frozen=True, eq=False)
class Round:
    """The packs of some consecutive steps."""

    order: np.ndarray
    """(steps,) int64: which step of the shares comes when."""
    shares: tuple[Share, ...]
    """One a lane."""
    next_cursors: tuple[Cursor, ...]


class Plan:
    """The order of a dataset's samples under a PlanConfig."""

    def __init__(self, dataset: Dataset, config: PlanConfig) -> None:
        """UserError if a parameter cannot be, lanes outnumber shards, an image has more tokens than `token_budget`, or
        a latent's side is not a multiple of `patch_size`."""
        self.config = config
        self._index = dataset.index
        self._manifest_digest = dataset.manifest.digest
        check_config(config, num_shards=len(dataset.index.shards), has_flips=dataset.manifest.flips)
        rows, columns, patch = dataset.index.rows, dataset.index.columns, config.patch_size
        if len(misfits := np.flatnonzero((rows % patch != 0) | (columns % patch != 0))):
            name, size = dataset.index.key(misfits[0]), f"{rows[misfits[0]]} x {columns[misfits[0]]}"
            raise UserError(
                f"plan: image {name!r} has a latent of {size}, which patch_size={patch} does not divide "
                f"({len(misfits):,} such images); encode with encode.patch_size={patch} or use another model.patch_size"
            )
        tokens = (rows // patch).astype(np.int64) * (columns // patch)
        if tokens[longest := int(tokens.argmax())] > config.token_budget:
            raise UserError(
                f"packing: image {dataset.index.key(longest)!r} has {tokens[longest]:,} tokens, more than "
                f"token_budget={config.token_budget}; raise data.token_budget or lower encode.max_tokens"
            )
        self.packs_per_lane = config.packs_per_step // config.lanes
        step_images = self.packs_per_lane * config.token_budget / tokens.mean()
        epoch_steps = int(len(tokens) / config.lanes / step_images)
        self.round_steps = max(1, min(max(FEWEST_STEPS, math.ceil(config.block_samples / step_images)), epoch_steps))
        """Steps of a round."""
        self._rounds: OrderedDict[tuple[int, tuple[Cursor, ...]], Round] = OrderedDict()

    def start(self) -> PlanState:
        """The state before the first step."""
        return PlanState(0, (Cursor(0, 0),) * self.config.lanes)

    def state_at(self, step: int) -> PlanState:
        """The state before any step: packs all rounds before it, about two seconds for a million images."""
        state = self.start()
        while step - state.step >= self.round_steps:
            state = self.next_round(state)
        return PlanState(step, state.cursors)

    def step(self, state: PlanState) -> tuple[list[Pack], PlanState]:
        """The packs of the state's step, in order of their position, and the state of the next step."""
        round, config, step = self.round(state), self.config, state.step
        first = int(round.order[step % self.round_steps]) * self.packs_per_lane
        parts = [
            share.sample_ids[share.starts[place] : share.starts[place + 1]]
            for share in round.shares
            for place in range(first, first + self.packs_per_lane)
        ]
        ends = np.cumsum([len(part) for part in parts])[:-1]
        sample_ids = np.concatenate(parts)
        flips = np.split(bernoulli(len(sample_ids), config.flip_probability, config.seed, "flip", step), ends)
        grids = np.split(self.grids(sample_ids), ends)
        packs = [
            Pack(step, pack, part, grids[pack], flips[pack], key_digest(config.seed, "noise", step, pack))
            for pack, part in enumerate(parts)
        ]
        after = self.next_round(state)
        return packs, after if after.step == step + 1 else PlanState(step + 1, state.cursors)

    def assign(self, packs: Sequence[Pack], world_size: int) -> list[list[Pack]]:
        """Share out a step's packs: the same number to every rank, as `share_out` does."""
        shares = share_out([pack.cost for pack in packs], self.config.lanes, world_size)
        return [[packs[position] for position in share] for share in shares]

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes that a rank reads from."""
        groups = math.gcd(self.config.lanes, world_size)
        group, lanes = rank // (world_size // groups), self.config.lanes // groups
        return range(group * lanes, (group + 1) * lanes)

    def shards_of(self, state: PlanState, lanes: Sequence[int]) -> list[int]:
        """Positions in the index of the shards that these lanes read in the state's round."""
        shares = self.round(state).shares
        ids = np.concatenate([shares[lane].sample_ids[shares[lane].starts[0] :] for lane in lanes])
        return np.unique(self._index.shard_of(ids)).tolist()

    def next_round(self, state: PlanState) -> PlanState:
        """The state at the beginning of the round behind the state's."""
        step = (state.step // self.round_steps + 1) * self.round_steps
        return PlanState(step, self.round(state).next_cursors)

    def describe(self) -> dict[str, Any]:
        """What the data order depends on: the dataset's version and every parameter."""
        return {"manifest": self._manifest_digest, **asdict(self.config)}

    def state_dict(self, state: PlanState) -> dict[str, Any]:
        """The state as JSON, a few kilobytes, with what it is only valid for."""
        return {"version": STATE_VERSION, "plan": self.describe(), "step": state.step, "cursors": state.cursors}

    def load_state(self, saved: dict[str, Any]) -> PlanState:
        """The state in `saved`. UserError that shows the differing field if it was saved under another plan."""
        if saved.get("version") != STATE_VERSION:
            raise UserError(f"plan: saved data state has version {saved.get('version')!r}, not {STATE_VERSION}")
        now, before = self.describe(), saved["plan"]
        differing = [
            f"{name} is {now.get(name)!r}, was {before.get(name)!r}"
            for name in sorted(now.keys() | before.keys())
            if now.get(name) != before.get(name)
        ]
        if differing:
            raise UserError(
                f"plan: cannot continue in the same data order: {'; '.join(differing)}; "
                "set it back, or begin a new run from the checkpoint's weights"
            )
        cursors = tuple(Cursor(int(epoch), int(at), tuple(map(int, ids))) for epoch, at, ids in saved["cursors"])
        if len(cursors) != self.config.lanes:
            raise UserError(f"plan: saved data state has {len(cursors)} cursors for {self.config.lanes} lanes")
        return PlanState(int(saved["step"]), cursors)

    def round(self, state: PlanState) -> Round:
        """The round of the state's step. The last three are kept: the trainer and the loader, which reads ahead, may
        stand on both sides of a round's end, and shards are fetched a round ahead."""
        key = (state.step // self.round_steps, state.cursors)
        if key not in self._rounds:
            number, cursors = key
            made = [self._share(lane, number, cursor) for lane, cursor in enumerate(cursors)]
            order = permutation(self.round_steps, self.config.seed, "steps", number)
            self._rounds[key] = Round(order, tuple(share for share, _ in made), tuple(after for _, after in made))
            while len(self._rounds) > 3:
                self._rounds.popitem(last=False)
        self._rounds.move_to_end(key)
        return self._rounds[key]

    def _share(self, lane: int, number: int, cursor: Cursor) -> tuple[Share, Cursor]:
        """A lane's packs of round `number`, and its cursor behind them."""
        config = self.config
        num_packs = self.round_steps * self.packs_per_lane
        pool = [np.array(cursor.carried, np.int64)]
        room = num_packs * config.token_budget - int(self.lengths(pool[0]).sum())
        epoch, position = cursor.epoch, cursor.position
        for part, wraps in self._stream(lane, epoch, position):
            tokens = self.lengths(part).cumsum()
            taken = int(np.searchsorted(tokens, room, side="right"))
            pool.append(part[:taken])
            room -= int(tokens[taken - 1]) if taken else 0
            position += taken
            if taken < len(part):
                break
            epoch, position = (epoch + 1, 0) if wraps else (epoch, position)
        sample_ids = np.concatenate(pool)
        key = (config.seed, "round", number, lane)
        places = PACKERS[config.packer](
            self.lengths(sample_ids),
            len(cursor.carried),
            config.token_budget,
            self.round_steps,
            self.packs_per_lane,
            key,
        )
        order = np.argsort(places, kind="stable")
        starts = np.searchsorted(places[order], np.arange(num_packs + 1))
        assert (np.diff(starts) > 0).all(), "every pack has an image"
        carried = tuple(sample_ids[order[: starts[0]]].tolist())
        return Share(sample_ids[order], starts), Cursor(epoch, position, carried)

    def _stream(self, lane: int, epoch: int, position: int) -> Iterator[tuple[np.ndarray, bool]]:
        """A lane's samples from a position of an epoch on, without end, and whether an epoch ends behind them."""
        while True:
            shards, bounds = self._lane(lane, epoch)
            for block, (start, end) in enumerate(pairwise(bounds)):
                if position < end:
                    ids = self._samples(shards, start, end)
                    ids = ids[permutation(len(ids), self.config.seed, "block", epoch, lane, block)]
                    yield ids[max(0, position - start) :], end == bounds[-1]
            epoch, position = epoch + 1, 0

    def _lane(self, lane: int, epoch: int) -> tuple[np.ndarray, list[int]]:
        """A lane's shards in an epoch, and where its blocks begin in the samples of the shards laid end to end."""
        shards = permutation(len(self._index.shards), self.config.seed, "shards", epoch)[lane :: self.config.lanes]
        size = int(np.diff(self._index.shard_starts)[shards].sum())
        num_blocks = max(1, size // self.config.block_samples)
        return shards, [size * block // num_blocks for block in range(num_blocks + 1)]

    def _samples(self, shards: np.ndarray, start: int, end: int) -> np.ndarray:
        """Samples start..end of these shards laid end to end."""
        bounds = self._index.shard_starts
        sizes = np.diff(bounds)[shards]
        before = sizes.cumsum() - sizes
        touched = (before < end) & (before + sizes > start)
        ids = np.concatenate([np.arange(bounds[shard], bounds[shard + 1]) for shard in shards[touched]])
        return ids[start - before[touched][0] :][: end - start]

    def grids(self, sample_ids: np.ndarray) -> np.ndarray:
        """(n, 2) int64: rows and columns of tokens."""
        sizes = np.stack([self._index.rows[sample_ids], self._index.columns[sample_ids]], axis=1)
        return sizes.astype(np.int64) // self.config.patch_size

    def lengths(self, sample_ids: np.ndarray) -> np.ndarray:
        """(n,) int64: tokens."""
        rows, columns, patch = self._index.rows[sample_ids], self._index.columns[sample_ids], self.config.patch_size
        return (rows // patch).astype(np.int64) * (columns // patch)


def share_out(costs: Sequence[int], lanes: int, world_size: int) -> list[list[int]]:
    """Which of a step's packs each rank takes, by their position: as many for every rank, the costliest first.

    Ranks and lanes fall into as many groups as both can be divided by, so that a rank reads from as few lanes as can
    be; within a group, costs are as even as longest-processing-time-first makes them. UserError if `world_size` does
    not divide the number of packs.
    """
    if world_size < 1 or len(costs) % world_size:
        sizes = [n for n in range(1, len(costs) + 1) if len(costs) % n == 0]
        raise UserError(
            f"plan: {world_size} data-parallel ranks cannot share {len(costs)} packs a step evenly; "
            f"use one of {', '.join(map(str, sizes))} ranks, or another data.packs_per_step in a new run"
        )
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    groups = math.gcd(lanes, world_size)
    per_group, ranks_per_group = len(costs) // groups, world_size // groups
    for group in range(groups):
        # a heap of (load, rank) of the ranks that are not full
        lightest = [(0, rank) for rank in range(group * ranks_per_group, (group + 1) * ranks_per_group)]
        positions = range(group * per_group, (group + 1) * per_group)
        for position in sorted(positions, key=lambda position: (-costs[position], position)):
            load, rank = heapq.heappop(lightest)
            ranks[rank].append(position)
            if len(ranks[rank]) < len(costs) // world_size:
                heapq.heappush(lightest, (load + costs[position], rank))
    return ranks


def check_config(config: PlanConfig, num_shards: int, has_flips: bool) -> None:
    """UserError for a value that cannot be, or not with this dataset."""
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in ("token_budget", "packs_per_step", "lanes", "block_samples", "patch_size") and value < 1:
            raise UserError(f"plan: {item.name} must be at least 1, got {value}")
    if config.packer not in PACKERS:
        raise UserError(f"plan: unknown data.packer {config.packer!r}; choose one of {', '.join(PACKERS)}")
    if not 0 <= config.flip_probability <= 1:
        raise UserError(f"plan: flip_probability must lie in 0..1, got {config.flip_probability}")
    if config.flip_probability > 0 and not has_flips:
        raise UserError("plan: the dataset has no mirrored latents; set data.flip_probability=0")
    if config.packs_per_step % config.lanes:
        raise UserError(
            f"plan: lanes={config.lanes} must divide packs_per_step={config.packs_per_step}; change data.lanes"
        )
    if config.lanes > num_shards:
        raise UserError(
            f"plan: lanes={config.lanes} but the dataset has {num_shards} shards; "
            "lower data.lanes, or encode with a smaller encode.shard_samples"
        )
