"""The plan: which images meet in which pack of which step. A pure function of (dataset, PlanConfig, state).

A dataset's shards are permuted every epoch, keyed by (seed, epoch), and dealt to lanes. A lane's samples are cut into
blocks; a block is shuffled, keyed by (seed, epoch, lane, block), packed, and its packs shuffled. A lane is one
endless stream of packs: epoch follows epoch without a short step, and a step takes the same number of packs from every
lane. The state is a cursor (epoch, block, pack) for each lane, so that any step costs one block a lane and not
a walk through the epochs. Nothing depends on the number of processes or workers: they only share out a step's packs.
"""

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

import numpy as np

from nitscale.data.manifest import Dataset
from nitscale.data.packing import pack_lengths
from nitscale.errors import UserError
from nitscale.randomness import bernoulli, key_digest, permutation

Cursor: TypeAlias = tuple[int, int, int]
"""The next pack of a lane: (epoch, block, pack)."""

WIDTH = 1152
"""Width D of the transformer (NiT-XL) that weighs linear work, 6 · D · n, against attention, n², in `Pack.cost`."""
STATE_VERSION = 1


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
    block_samples: int = 16384
    """Fewest samples of a block, which is shuffled and packed together; a lane with fewer is one block."""
    patch_size: int = 1
    """Latent cells of one token's side."""
    packer: str = "lpfhp"
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

    @property
    def num_tokens(self) -> int:
        return int(self.grids.prod(axis=1).sum())

    @property
    def cost(self) -> int:
        """Work of the pack in multiply-adds, up to a factor: Σ nᵢ² for attention and 6 · D · nᵢ for the rest."""
        lengths = self.grids.prod(axis=1)
        return int((lengths * (lengths + 6 * WIDTH)).sum())


@dataclass(frozen=True)
class PlanState:
    """Where the plan stands: everything that resuming needs."""

    step: int
    cursors: tuple[Cursor, ...]
    """One a lane."""


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
        self._blocks: OrderedDict[Cursor, tuple[list[np.ndarray], int]] = OrderedDict()

    def start(self) -> PlanState:
        """The state before the first step."""
        return PlanState(0, ((0, 0, 0),) * self.config.lanes)

    def step(self, state: PlanState) -> tuple[list[Pack], PlanState]:
        """The packs of the state's step, in order of their position, and the state of the next step."""
        per_lane = self.config.packs_per_step // self.config.lanes
        packs, cursors = [], []
        for lane, cursor in enumerate(state.cursors):
            for position in range(per_lane):
                sample_ids, cursor = self._next_pack(lane, cursor)
                packs.append(self._make_pack(state.step, lane * per_lane + position, sample_ids))
            cursors.append(cursor)
        return packs, PlanState(state.step + 1, tuple(cursors))

    def assign(self, packs: Sequence[Pack], world_size: int) -> list[list[Pack]]:
        """Share out a step's packs: the same number to every rank, costs as even as longest-processing-time-first
        makes them, the costliest first on every rank. UserError if `world_size` does not divide their number."""
        if world_size < 1 or len(packs) % world_size:
            sizes = [n for n in range(1, len(packs) + 1) if len(packs) % n == 0]
            raise UserError(
                f"plan: {world_size} data-parallel ranks cannot share {len(packs)} packs a step evenly; "
                f"use one of {', '.join(map(str, sizes))} ranks, or another data.packs_per_step in a new run"
            )
        ranks: list[list[Pack]] = [[] for _ in range(world_size)]
        lightest = [(0, rank) for rank in range(world_size)]  # a heap of (load, rank) of the ranks that are not full
        for pack in sorted(packs, key=lambda pack: (-pack.cost, pack.pack)):
            load, rank = heapq.heappop(lightest)
            ranks[rank].append(pack)
            if len(ranks[rank]) < len(packs) // world_size:
                heapq.heappush(lightest, (load + pack.cost, rank))
        return ranks

    def describe(self) -> dict[str, Any]:
        """What the data order depends on: the dataset's version and every parameter."""
        return {"manifest": self._manifest_digest, **asdict(self.config)}

    def state_dict(self, state: PlanState) -> dict[str, Any]:
        """The state as JSON, a few hundred bytes, with what it is only valid for."""
        cursors = [list(cursor) for cursor in state.cursors]
        return {"version": STATE_VERSION, "plan": self.describe(), "step": state.step, "cursors": cursors}

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
        cursors = tuple((int(epoch), int(block), int(pack)) for epoch, block, pack in saved["cursors"])
        if len(cursors) != self.config.lanes:
            raise UserError(f"plan: saved data state has {len(cursors)} cursors for {self.config.lanes} lanes")
        return PlanState(int(saved["step"]), cursors)

    def _next_pack(self, lane: int, cursor: Cursor) -> tuple[np.ndarray, Cursor]:
        """Sample ids of the pack at a lane's cursor, and the cursor behind it."""
        epoch, block, position = cursor
        packs, num_blocks = self._block(lane, epoch, block)
        if position + 1 < len(packs):
            return packs[position], (epoch, block, position + 1)
        return packs[position], (epoch, block + 1, 0) if block + 1 < num_blocks else (epoch + 1, 0, 0)

    def _block(self, lane: int, epoch: int, block: int) -> tuple[list[np.ndarray], int]:
        """The packs of a block as sample ids, and the number of blocks of the lane in this epoch.

        The last few are kept: a step and the loader's look-ahead may lie on both sides of a block's end."""
        key = (lane, epoch, block)
        if key not in self._blocks:
            self._blocks[key] = self._pack_block(lane, epoch, block)
            while len(self._blocks) > 2 * self.config.lanes + 1:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _pack_block(self, lane: int, epoch: int, block: int) -> tuple[list[np.ndarray], int]:
        """`_block`, computed."""
        index, seed = self._index, self.config.seed
        shards = permutation(len(index.shards), seed, "shards", epoch)[lane :: self.config.lanes]
        ids = np.concatenate([np.arange(index.shard_starts[i], index.shard_starts[i + 1]) for i in shards])
        num_blocks = max(1, len(ids) // self.config.block_samples)
        ids = ids[len(ids) * block // num_blocks : len(ids) * (block + 1) // num_blocks]
        ids = ids[permutation(len(ids), seed, "block", epoch, lane, block)]
        packs = pack_lengths(self._grids(ids).prod(axis=1), self.config.token_budget)
        return [ids[packs[i]] for i in permutation(len(packs), seed, "packs", epoch, lane, block)], num_blocks

    def _grids(self, sample_ids: np.ndarray) -> np.ndarray:
        """(n, 2) int64: rows and columns of tokens."""
        sizes = np.stack([self._index.rows[sample_ids], self._index.columns[sample_ids]], axis=1)
        return sizes.astype(np.int64) // self.config.patch_size

    def _make_pack(self, step: int, pack: int, sample_ids: np.ndarray) -> Pack:
        seed = self.config.seed
        flips = bernoulli(len(sample_ids), self.config.flip_probability, seed, "flip", step, pack)
        noise_key = key_digest(seed, "noise", step, pack)
        return Pack(step, pack, sample_ids, self._grids(sample_ids), flips, noise_key)


def step_digest(packs: Sequence[Pack]) -> bytes:
    """sha256 of a whole step's sample ids, flips and noise keys, in the order of the packs' positions."""
    digest = hashlib.sha256()
    for pack in sorted(packs, key=lambda pack: pack.pack):
        digest.update(np.array([pack.step, pack.pack, len(pack.sample_ids), pack.noise_key], "<i8").tobytes())
        digest.update(pack.sample_ids.astype("<i8").tobytes() + pack.flips.astype("u1").tobytes())
    return digest.digest()


def chain_digest(previous: str, packs: Sequence[Pack]) -> str:
    """The data digest after a step, from the one before it ("" at the start): two runs saw the same data if equal."""
    return hashlib.sha256(previous.encode() + step_digest(packs)).hexdigest()


def check_config(config: PlanConfig, num_shards: int, has_flips: bool) -> None:
    """UserError for a value that cannot be, or not with this dataset."""
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in ("token_budget", "packs_per_step", "lanes", "block_samples", "patch_size") and value < 1:
            raise UserError(f"plan: {item.name} must be at least 1, got {value}")
    if config.packer != "lpfhp":
        raise UserError(f"plan: unknown data.packer {config.packer!r}; this build has 'lpfhp'")
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
