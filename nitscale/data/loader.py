"""The loader: reads the packs of one rank, step by step, ahead of the trainer, in worker processes.

The main process walks the plan and hands out packs (a few hundred numbers each); workers read the latents by offset,
and on request the images that they are of or an encoder's features of them, and return batches in the plan's order,
whatever the number of workers. A sample that cannot be read keeps its place with zero tokens and weight 0, so that
shapes and order never move.
"""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from nitscale.data.cache import CachedStorage
from nitscale.data.manifest import Dataset
from nitscale.data.plan import Pack, Plan, PlanState
from nitscale.data.shards import LATENT_DTYPES, UnreadableSample, read_latent_bytes, read_member
from nitscale.data.storage import Storage
from nitscale.errors import UserError
from nitscale.layout import PackedBatch, PackedImages, PackLayout

RETRY_DELAYS = (0.05, 0.5)
"""Seconds before a sample that could not be read is tried again: file systems over a network recover."""
PREFETCHED_PACKS = 4
"""Packs that every worker reads ahead."""

T = TypeVar("T")


class Contents(NamedTuple):
    """What a worker reads of a pack."""

    tokens: Tensor
    """(N, F), image after image as they are stored, zero where an image could not be read."""
    unreadable: tuple[tuple[int, str], ...]
    """(sample id, reason) of the images that could not be read."""
    pixels: Tensor | None
    """As in `PackedImages`."""
    features: Tensor | None
    """(N, Z) float16."""


Item: TypeAlias = tuple[Pack, Contents]

TRAINERS_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""Signals that worker processes do not act on, unless the trainer sends them."""


class WorkerDied(RuntimeError):
    """A loader process ended by itself."""


class PackLoader:
    """Iterates over the packs of one rank, without end, from a given state of the plan."""

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        state: PlanState,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        members: Sequence[str] = (),
    ) -> None:
        """`workers` processes read ahead; with 0 the caller reads. Of the optional `members` of a sample, "image" and
        "features" can be read, too. UserError if `world_size` does not suit the plan, or the dataset lacks a member."""
        plan.assign(plan.step(state)[0], world_size)  # complain now rather than at the first batch
        check_members(dataset, plan.config.patch_size, members)
        self._dataset, self._patch_size, self._pin_memory = dataset, plan.config.patch_size, pin_memory
        self._loader = DataLoader(
            _PackReader(dataset, plan.config.patch_size, members),
            batch_size=None,
            collate_fn=_as_it_is,
            sampler=_RankPacks(dataset, plan, state, rank, world_size),
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=PREFETCHED_PACKS if workers else None,
            worker_init_fn=functools.partial(_start_worker, trainer=os.getpid()),
        )

    def __iter__(self) -> Generator[PackedBatch]:
        """This rank's packs of the state's step, then of the next, and so on; `packs_per_step / world_size` a step.

        Each batch carries the seconds that the caller waited for it. WorkerDied if a worker process ends; close the
        iterator to end the workers.
        """
        batches, workers = start_workers(self._loader)
        while True:
            started = time.perf_counter()
            try:
                pack, contents = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                # What a worker had to hand over when it died can fail in any of these ways.
                if dead := [f"{worker.pid} ({describe_exit(worker)})" for worker in ended(workers)]:
                    raise WorkerDied(
                        f"loader: worker process {', '.join(dead)} ended by itself; "
                        "if memory ran out, lower data.workers; run again to continue from the last checkpoint"
                    ) from error
                raise
            batch = make_batch(self._dataset, pack, self._patch_size, contents)
            batch = batch.pin_memory() if self._pin_memory else batch
            yield replace(batch, data_wait_s=time.perf_counter() - started)


def start_workers(loader: DataLoader[Item]) -> tuple[Iterator[Item], list[BaseProcess]]:
    """Begin to iterate; also the worker processes. Without the handler by which torch (2.13) notices a dead worker.

    It raises wherever the trainer happens to be, in the middle of a checkpoint say, and again with every other child
    that ends. Without it the death is noticed within five seconds of waiting for the worker, and nowhere else.
    """
    others = set(multiprocessing.active_children())
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINERS_SIGNALS)  # forked workers inherit it
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)
    return batches, sorted(set(multiprocessing.active_children()) - others, key=lambda worker: worker.name)


def ended(workers: list[BaseProcess]) -> list[BaseProcess]:
    """The workers that are dead or dying; waits a second for the first one, because a process's end takes a moment."""
    dying = wait_for_any([worker.sentinel for worker in workers], timeout=1)
    for worker in workers:
        if worker.sentinel in dying:
            worker.join(timeout=1)
    return [worker for worker in workers if not worker.is_alive()]


def describe_exit(process: BaseProcess) -> str:
    """How a process ended, in words."""
    code = process.exitcode or 0
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def check_members(dataset: Dataset, patch_size: int, members: Sequence[str]) -> None:
    """UserError if the dataset lacks an optional member, with the way to get it, or its features are not as many for
    every token."""
    ways = {
        "image": "encode it again with `nitscale encode --jpeg`, which keeps the pixels that were encoded as KEY.jpg",
        "features": "add KEY.features.npy to every sample and run `nitscale data index`",
    }
    for member in members:
        if member not in dataset.manifest.members:
            raise UserError(f"loader: the samples of {dataset.storage.prefix} have no {member}; {ways[member]}")
        if member == "features":
            feature_width(dataset, patch_size)


def feature_width(dataset: Dataset, patch_size: int) -> int:
    """Z of the dataset's features: numbers of one token. UserError if it is not the same for every sample."""
    index = dataset.index
    tokens = index.rows.astype(np.int64) * index.columns // patch_size**2
    widths = np.unique(index.extra["features_length"] / (2 * tokens))
    if len(widths) > 1 or widths[0] < 1 or widths[0] % 1:
        raise UserError(
            f"loader: the features in {dataset.storage.prefix} have {', '.join(f'{width:g}' for width in widths[:4])} "
            f"numbers a token; make them of one vector for every token of patch size {patch_size}"
        )
    return int(widths[0])


def read_pack(dataset: Dataset, pack: Pack, patch_size: int, members: Sequence[str] = ()) -> PackedBatch:
    """Read one pack here and now."""
    check_members(dataset, patch_size, members)
    return make_batch(dataset, pack, patch_size, read_contents(dataset, pack, patch_size, members))


def read_contents(dataset: Dataset, pack: Pack, patch_size: int, members: Sequence[str] = ()) -> Contents:
    """What the pack's images hold. A sample of which anything cannot be read is all zero.

    This is the loader's inner loop, a few ten microseconds an image where only latents are read: NumPy moves the
    numbers as plain integers of their width, in the order of `patchify`.
    """
    manifest, storage, index = dataset.manifest, dataset.storage, dataset.index
    tokens = torch.zeros(pack.num_tokens, manifest.channels * patch_size**2, dtype=LATENT_DTYPES[manifest.dtype])
    words = tokens.view(torch.int16 if tokens.itemsize == 2 else torch.int32).numpy()
    refs = {member: index.member_refs(member, pack.sample_ids, pack.flips) for member in members}
    pixels = features = None
    token_pixels = 3 * (manifest.factor * patch_size) ** 2
    if "image" in members:
        pixels = torch.zeros(pack.num_tokens * token_pixels, dtype=torch.uint8)
    if "features" in members:
        width = refs["features"][0].length // (2 * int(pack.lengths[0]))
        features = torch.zeros(pack.num_tokens, width, dtype=torch.float16)
    unreadable = []
    start = 0
    samples = zip(index.refs(pack.sample_ids), pack.sample_ids.tolist(), pack.flips.tolist(), strict=True)
    for i, (ref, sample_id, flipped) in enumerate(samples):
        rows, columns = ref.grid[0] // patch_size, ref.grid[1] // patch_size
        end = start + rows * columns
        try:
            read_latent = functools.partial(read_latent_bytes, storage, ref, manifest.bytes_per_cell, flipped)
            data = with_retries(read_latent, storage, ref.shard)
            read = {
                member: with_retries(functools.partial(read_member, storage, of_member[i]), storage, ref.shard)
                for member, of_member in refs.items()
            }
            if pixels is not None:
                size = (ref.grid[0] * manifest.factor, ref.grid[1] * manifest.factor)
                image = decode_jpeg(read["image"], size, f"{ref.shard}: image of sample {sample_id}")
                place = pixels[start * token_pixels : end * token_pixels].numpy().reshape(image.shape)
                place[:] = image[:, ::-1] if flipped else image
            if features is not None:
                place = features[start:end].view(torch.int16).numpy()
                place.reshape(-1)[:] = np.frombuffer(read["features"], np.int16)
            latent = np.frombuffer(data, words.dtype).reshape(-1, rows, patch_size, columns, patch_size)
            words[start:end].reshape(rows, columns, -1, patch_size, patch_size)[:] = latent.transpose(1, 3, 0, 2, 4)
        except UnreadableSample as error:
            unreadable.append((sample_id, str(error)))
        start = end
    return Contents(tokens, tuple(unreadable), pixels, features)


def decode_jpeg(data: bytes, size: tuple[int, int], name: str) -> np.ndarray:
    """The pixels of a JPEG of this (height, width), (height, width, 3) uint8. UnreadableSample if it is damaged or of
    another size, of which it takes no memory."""
    try:
        found = simplejpeg.decode_jpeg_header(data)[:2]
        if found != size:
            raise UnreadableSample(f"{name}: {found[0]} x {found[1]} pixels, its latent is of {size[0]} x {size[1]}")
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        raise UnreadableSample(f"{name}: {error}") from error


def make_batch(dataset: Dataset, pack: Pack, patch_size: int, contents: Contents) -> PackedBatch:
    """The batch of a pack that was read."""
    failed = [sample_id for sample_id, _ in contents.unreadable]
    images = None
    if contents.pixels is not None:
        sizes = pack.grids * (dataset.manifest.factor * patch_size)
        images = PackedImages(contents.pixels, tuple((height, width) for height, width in sizes.tolist()))
    return PackedBatch(
        tokens=contents.tokens,
        labels=torch.from_numpy(dataset.index.label[pack.sample_ids].astype(np.int64)),
        layout=PackLayout.from_grids([(rows, columns) for rows, columns in pack.grids.tolist()]),
        weights=torch.from_numpy(np.isin(pack.sample_ids, failed, invert=True).astype(np.float32)),
        sample_ids=tuple(pack.sample_ids.tolist()),
        flips=tuple(pack.flips.tolist()),
        step=pack.step,
        pack=pack.pack,
        unreadable=contents.unreadable,
        images=images,
        features=contents.features,
    )


def with_retries(read: Callable[[], T], storage: Storage, shard: str) -> T:
    """What `read` reads of a shard. UnreadableSample if it cannot be read after RETRY_DELAYS."""
    for delay in (*RETRY_DELAYS, None):
        try:
            return read()
        except UnreadableSample:
            if delay is None:
                raise
            storage.forget(shard)  # a file opened anew, or a cached copy fetched anew, may be right
            time.sleep(delay)
    raise AssertionError("unreachable")


class _PackReader(TorchDataset[Item]):
    """Reads the contents of the pack that it is asked for.

    Of the batch, only these are made here: every tensor that leaves a worker costs a millisecond or so for the passing
    of its file descriptor, more than the rest of the batch takes to make.
    """

    def __init__(self, dataset: Dataset, patch_size: int, members: Sequence[str]) -> None:
        self.dataset, self.patch_size, self.members = dataset, patch_size, members

    def __getitem__(self, pack: Pack) -> Item:
        return pack, read_contents(self.dataset, pack, self.patch_size, self.members)


class _RankPacks(Sampler[Pack]):
    """This rank's packs, in order, without end."""

    def __init__(self, dataset: Dataset, plan: Plan, state: PlanState, rank: int, world_size: int) -> None:
        self.dataset, self.plan, self.state, self.rank, self.world_size = dataset, plan, state, rank, world_size

    def __iter__(self) -> Iterator[Pack]:
        state = self.state
        while True:
            if state is self.state or state.step % self.plan.round_steps == 0:
                self.expect_shards(state)
            packs, state = self.plan.step(state)
            yield from self.plan.assign(packs, self.world_size)[self.rank]

    def expect_shards(self, state: PlanState) -> None:
        """Tell a cache which shards this rank reads in this round and the next, so that it fetches and keeps them."""
        storage = self.dataset.storage
        if not isinstance(storage, CachedStorage):
            return
        lanes = self.plan.lanes_of(self.rank, self.world_size)
        coming = self.plan.shards_of(state, lanes) + self.plan.shards_of(self.plan.next_round(state), lanes)
        storage.expect([self.dataset.index.shards[shard] for shard in dict.fromkeys(coming)])


def _as_it_is(item: Any) -> Any:
    """Instead of the default, which turns tuples into lists."""
    return item


def _start_worker(worker: int, trainer: int) -> None:
    """Workers read with one thread. They leave Ctrl-C and a scheduler's SIGTERM, which go to all processes of a job, to
    the trainer, which may want to save a checkpoint; they end when the trainer ends them or is gone."""
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, TRAINERS_SIGNALS)
    # multiprocessing ends its children by SIGTERM, and then waits for them: obey it when it comes from the trainer.
    threading.Thread(target=_obey_sigterm_of, args=(trainer,), daemon=True).start()


def _obey_sigterm_of(trainer: int) -> None:
    """End this process at the first SIGTERM that `trainer` sends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
