"""From latents to committed partitions: results in any order → samples in order → shards → storage → marker.

Two threads: one writes and hashes shards on the local disk, the other publishes them, so that an upload holds up
neither the next shard nor the encoder.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from data_prep.commits import (
    Commit,
    ShardEntry,
    commit_partition,
    delete_objects,
    is_whole,
    object_names,
    objects_of,
    read_commit,
)
from data_prep.folders import readable
from data_prep.pipeline import Encoded, Message, PartitionEnd, PartitionStart, Result, Results
from data_prep.prepare import EncodeConfig, Failure
from data_prep.stages import Channel, Clock
from nitscale.data.index import index_bytes, index_shard
from nitscale.data.shards import ShardWriter
from nitscale.data.storage import Storage
from nitscale.errors import UserError
from nitscale.files import disk_errors

SHARDS_AHEAD = 2
"""Finished shards that may wait on the local disk to be published."""


@dataclass(frozen=True)
class Layout:
    """What shards are to look like."""

    config: EncodeConfig
    classes: tuple[str, ...] | None
    """Names of the classes; None if labels are mere numbers."""
    text: bool
    """Whether every sample has a caption, if only an empty one."""


@dataclass(frozen=True)
class FinishedShard:
    """A shard on the local disk."""

    number: int
    """Of its partition."""
    path: Path
    entry: ShardEntry
    index: bytes


@dataclass(frozen=True)
class FinishedPartition:
    """All shards of the partition have come. With `error`, it was given up."""

    commit: Commit
    error: UserError | None


Finished: TypeAlias = FinishedShard | FinishedPartition


@dataclass(eq=False)
class Scratch:
    """Local files of this job, on the disk from which the storage publishes: a finished one is renamed, not copied."""

    storage: Storage
    paths: set[Path] = field(default_factory=set)

    def new(self, name: str) -> Path:
        """A path for what may become the object `name`, or one beside it."""
        with suppress(_NotPublished), self.storage.create(name) as path:
            raise _NotPublished
        self.paths.add(path)
        return path

    def publish(self, path: Path, name: str) -> None:
        """Make the file an object."""
        with self.storage.create(name) as target:
            os.replace(path, target)
        self.paths.discard(path)

    def remove(self) -> None:
        """Remove what was not published."""
        for path in self.paths:
            path.unlink(missing_ok=True)
        self.paths.clear()


class _NotPublished(Exception):
    pass


class OpenShard:
    """A shard that is being written."""

    def __init__(self, number: int, path: Path, renditions: Sequence[str]) -> None:
        self.number, self.path, self.renditions = number, path, renditions
        self.samples = 0
        self._closing = ExitStack()
        with disk_errors(path):
            file = self._closing.enter_context(path.open("wb"))
            self._writer = self._closing.enter_context(ShardWriter(file))

    def add(self, *arguments: Any) -> None:
        """See `ShardWriter.add`."""
        with disk_errors(self.path):
            self._writer.add(*arguments)
        self.samples += 1

    def finish(self) -> FinishedShard:
        """Close the file, read it back, and name it after its contents."""
        with disk_errors(self.path):
            self._closing.close()
        arrays = index_shard(self.path, self.renditions)
        assert len(arrays["keys"]) == self.samples
        with open(self.path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        tar, name = object_names(self.number, sha256)
        index = index_bytes(arrays)
        entry: ShardEntry = {
            "tar": tar,
            "index": name,
            "samples": self.samples,
            "bytes": self.path.stat().st_size,
            "sha256": sha256,
            "index_bytes": len(index),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }
        return FinishedShard(self.number, self.path, entry, index)

    def abandon(self) -> None:
        with suppress(OSError):
            self._closing.close()


class PartitionWriter:
    """Writes the samples of one partition in order, and counts them."""

    def __init__(
        self, start: PartitionStart, layout: Layout, scratch: Scratch, send: Callable[[Finished], None]
    ) -> None:
        self.layout, self.scratch, self.send = layout, scratch, send
        self.number, self.name = start.number, start.partition.name
        self.next = 0
        """The position that comes next; what is behind it waits."""
        self.failures: list[dict[str, Any]] = []
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in ("grids", "labels", "renditions")}
        self.samples = self.tokens = self.without_text = self.dropped_text = 0
        self._waiting: dict[int, Result] = {}
        self._shard: OpenShard | None = None

    def take(self, results: Iterable[tuple[int, Result]]) -> None:
        """Results of some positions; writes those whose turn it is."""
        self._waiting.update(results)
        while self.next in self._waiting:
            result = self._waiting.pop(self.next)
            self.next += 1
            if isinstance(result, Failure):
                self.failures.append(asdict(result))
            elif result is not None:
                self._write(result)

    def finish(self, end: PartitionEnd) -> None:
        """Send the last shard and the marker."""
        if self._shard is not None:
            self._finish_shard(self._shard)
        commit: Commit = {"partition": self.name, "images": end.images, "samples": self.samples, "tokens": self.tokens}
        commit |= {name: dict(sorted(count.items())) for name, count in self.counts.items()}
        commit |= {"without_text": self.without_text, "dropped_text": self.dropped_text, "failures": self.failures}
        rules = len(self.layout.config.resize)
        assert end.error or (not self._waiting and self.next == end.images * rules), "results are missing"
        self.send(FinishedPartition(commit, end.error))

    def abandon(self) -> None:
        """Close what is open."""
        if self._shard is not None:
            self._shard.abandon()

    def _write(self, encoded: Encoded) -> None:
        config, about = self.layout.config, encoded.about
        item, (rows, columns) = about.item, encoded.latents.shape[2:]
        key = item.key if len(config.resize) == 1 else f"{item.key}-{about.rendition}"
        metadata = {
            "key": key,
            "class": str(item.label) if self.layout.classes is None else self.layout.classes[item.label],
            "label": item.label,
            "rendition": about.rendition,
            "image_size": list(about.image_size),
            "grid": [rows, columns],
            "source": item.name,
        }
        if self._shard is None:
            path = self.scratch.new(f"shards/{self.number:06d}.tar")
            self._shard = OpenShard(self.number, path, config.resize)
        text = readable(item.text or "") if self.layout.text else None
        self._shard.add(key, encoded.latents, metadata, about.jpeg, text)
        self.samples += 1
        self.tokens += rows * columns
        self.without_text += self.layout.text and not item.text
        self.dropped_text += not self.layout.text and bool(item.text)
        self.counts["grids"][f"{rows} x {columns}"] += 1
        self.counts["labels"][str(item.label)] += 1
        self.counts["renditions"][about.rendition] += 1
        if self._shard.samples == config.shard_samples:
            self._finish_shard(self._shard)

    def _finish_shard(self, shard: OpenShard) -> None:
        self._shard = None
        self.send(shard.finish())


def write_shards(
    results: Iterable[Message],
    layout: Layout,
    scratch: Scratch,
    finished: Channel[Finished],
    clock: Clock,
    progress: Callable[[int, int], None],
) -> None:
    """Write what comes from the encoder. `progress` gets images and failures as they come."""
    writer: PartitionWriter | None = None
    rules = len(layout.config.resize)

    def send(item: Finished) -> None:
        began = time.perf_counter()
        finished.put(item)
        clock.add("write", began - time.perf_counter())  # to wait for the publisher is no work

    try:
        for message in results:
            if isinstance(message, PartitionStart):
                writer = PartitionWriter(message, layout, scratch, send)
            assert writer is not None
            before = writer.next // rules, len(writer.failures)
            with clock.busy("write"):
                if isinstance(message, Results):
                    writer.take(message.results)
                elif isinstance(message, PartitionEnd):
                    writer.finish(message)
            progress(writer.next // rules - before[0], len(writer.failures) - before[1])
        finished.finish()
    finally:
        if writer is not None:
            writer.abandon()


@dataclass(eq=False)
class Publisher:
    """Brings shards, indices and markers to the storage, in this order."""

    storage: Storage
    scratch: Scratch
    clock: Clock
    replaced: frozenset[str]
    """Partitions whose marker is to be replaced: it was found damaged, or its failures are tried again."""
    committed: Callable[[Commit], None]
    """Is told of every partition, with the marker that now holds. May raise, to end the job."""
    commits: dict[str, Commit] = field(default_factory=dict)
    """The markers that hold now, by partition."""
    given_up: list[UserError] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Partitions that another job committed first."""

    def run(self, finished: Iterable[Finished]) -> None:
        """Publish what comes."""
        entries: list[ShardEntry] = []
        for item in finished:
            with self.clock.busy("publish"):
                if isinstance(item, FinishedShard):
                    self.scratch.publish(item.path, item.entry["tar"])
                    self.storage.write(item.entry["index"], item.index)
                    entries.append(item.entry)
                else:
                    self._commit(item.commit | {"shards": entries}, item.error)
                    entries = []

    def _commit(self, commit: Commit, error: UserError | None) -> None:
        name = commit["partition"]
        if error is not None:
            self.given_up.append(error)
            earlier = read_commit(self.storage, name)
            delete_objects(self.storage, set(objects_of(commit)) - set(objects_of(earlier) if earlier else ()))
            return
        replace = name in self.replaced
        self.commits[name] = commit_partition(self.storage, commit, replace)
        self.lost += [name] * (self.commits[name] is not commit)
        if replace and not is_whole(self.storage, commit):
            raise UserError(
                f"encode: {self.storage.prefix} was finished by another job while partition {name} was made anew, "
                "which removed the new shards; run this job again"
            )
        self.committed(self.commits[name])
