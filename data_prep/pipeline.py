"""From partitions of a source to latents: read, decode and resize in threads, batch equal sizes, encode on the device.

All of it runs at once (see `stages.py`), so that the encoder finds the next batch waiting for it. What is batched with
what depends on the order of the images alone, never on timing: the same images give the same latents with any number of
threads. Memory is bounded by budgets of pixels, whatever the images' sizes.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import TypeAlias

from torch import Tensor

from data_prep.encoder import Encoder, Latents, Pending
from data_prep.items import ImageItem, Partition
from data_prep.prepare import About, EncodeConfig, Failure, Preparation, Prepared, Sample
from data_prep.sources import Source
from data_prep.stages import Budget, Channel, Clock, OrderedWork, Stages
from nitscale.errors import UserError

__all__ = ["EncodeConfig", "Failure"]

AHEAD_PIXELS = 2**25
"""Pixels of decoded images that may wait to be batched: 96 MiB of 8-bit RGB."""
AHEAD_IMAGES = 16
"""Images that a decoding thread may be ahead, so that one large or late image holds nobody up."""
WINDOW_PIXELS = 2**26
"""Pixels of the images among which equal sizes are sought: 192 MiB."""
WINDOW_SAMPLES = 1024
"""How far apart two samples of a batch may be in order: their neighbours' results wait for them in memory."""
BATCH_PIXELS = 2**22
"""Pixels of one batch of the codec, mirror images apart."""
BATCHES_AHEAD = 2
"""Batches of that size that may wait for the device."""
RESULT_BYTES = 2**27
"""Bytes of latents and JPEGs that may wait to be written."""
FAILED_PARTITIONS = 2
"""Partitions one after another that cannot be read, after which something larger is wrong than one of them."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One sample's latents."""

    about: About
    latents: Tensor
    """(v, c, h, w), on the CPU."""


Result: TypeAlias = Encoded | Failure | None
"""None: see `Prepared`."""


@dataclass(frozen=True)
class PartitionStart:
    """What follows belongs to this partition, the `number`-th of the source."""

    number: int
    partition: Partition


@dataclass(frozen=True)
class Results:
    """Results of some positions of the partition, in no particular order. Position = image x rules + rule."""

    results: list[tuple[int, Result]]


@dataclass(frozen=True)
class PartitionEnd:
    """All results of the partition have come. With `error`, its source failed, and it is not whole."""

    images: int
    error: UserError | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one size."""

    positions: list[int]
    abouts: list[About]
    pixels: Tensor
    """(b, H, W, 3) uint8; in page-locked memory if the device is a GPU."""


Boundary: TypeAlias = PartitionStart | PartitionEnd
Message: TypeAlias = PartitionStart | Results | PartitionEnd


def start_pipeline(
    stages: Stages,
    partitions: Iterable[tuple[int, Partition]],
    source: Source,
    prepare: Preparation,
    encoder: Encoder,
    workers: int,
) -> Channel[Batch | Message]:
    """Start everything before the device, in threads of `stages`: the channel of what comes out, in order."""
    opened: Channel[Opened] = stages.add(Channel())
    to_open = stages.add(Budget(1))
    pixels = stages.add(Budget(AHEAD_PIXELS))
    work: OrderedWork[Prepared | Boundary] = stages.add(OrderedWork(AHEAD_IMAGES * workers, pixels))
    batches: Channel[Batch | Message] = stages.add(Channel(BATCHES_AHEAD * BATCH_PIXELS))
    # Not waited for at the end: it may be downloading an archive.
    stages.start("open", partial(open_partitions, partitions, source, opened, to_open), wait=False)
    stages.start("feed", partial(feed, opened, to_open, work, pixels, prepare))
    for number in range(workers):
        stages.start(f"decode {number}", work.work, wait=False)
    stages.start("batch", partial(batch, work, pixels, encoder, batches))
    return batches


@dataclass(frozen=True)
class Opened:
    """A partition with its first image at hand."""

    start: PartitionStart
    items: Iterator[ImageItem]
    error: UserError | None = None


def open_partitions(
    partitions: Iterable[tuple[int, Partition]], source: Source, opened: Channel[Opened], to_open: Budget
) -> None:
    """Open one partition while the one before is worked on: that may mean to download and scan an archive."""
    for number, partition in partitions:
        start, error = PartitionStart(number, partition), None
        items: Iterator[ImageItem] = iter(())
        try:
            items = source.items(partition)
            if (first := next(items, None)) is not None:
                items = chain([first], items)
        except UserError as failed:
            error = failed
        opened.put(Opened(start, items, error))
        to_open.spend(1)
        to_open.wait()
    opened.finish()


def feed(
    opened: Channel[Opened],
    to_open: Budget,
    work: OrderedWork[Prepared | Boundary],
    pixels: Budget,
    prepare: Preparation,
) -> None:
    """Give the decoding threads the images of one partition after another. UserError if several cannot be read."""

    def prepare_one(item: ImageItem) -> Prepared:
        prepared = prepare(item)
        pixels.spend(sum(sample.area for sample in prepared if isinstance(sample, Sample)))
        return prepared

    failed = 0
    for partition in opened:
        to_open.spend(-1)
        work.put(partial(_itself, partition.start))
        images, error = 0, partition.error
        try:
            for item in partition.items:
                work.put(partial(prepare_one, item))
                images += 1
        except UserError as caught:
            error = caught
        work.put(partial(_itself, PartitionEnd(images, error)))
        failed = failed + 1 if error else 0
        if failed == FAILED_PARTITIONS and error:
            raise error
    work.finish()


def _itself(boundary: Boundary) -> Boundary:
    return boundary


def batch(
    work: Iterable[Prepared | Boundary], pixels: Budget, encoder: Encoder, batches: Channel[Batch | Message]
) -> None:
    """Sort samples into batches of equal size."""

    def send(samples: list[tuple[int, Sample]]) -> None:
        stacked = encoder.stack([sample.pixels for _, sample in samples])
        positions, abouts = [position for position, _ in samples], [sample.about for _, sample in samples]
        batches.put(Batch(positions, abouts, stacked), stacked[..., 0].numel())

    buckets, positions = Buckets(), count()
    for item in work:
        if isinstance(item, PartitionStart):
            buckets, positions = Buckets(), count()
            batches.put(item, 0)
        elif isinstance(item, PartitionEnd):
            for samples in buckets.flush():
                send(samples)
            batches.put(item, 0)
        else:
            pixels.spend(-sum(sample.area for sample in item if isinstance(sample, Sample)))
            for sample, position in zip(item, positions, strict=False):
                if isinstance(sample, Sample):
                    for samples in buckets.add(position, sample):
                        send(samples)
                else:
                    batches.put(Results([(position, sample)]), 0)
    batches.finish()


class Buckets:
    """Samples by size, until there are enough of one size, or too many in all."""

    def __init__(self) -> None:
        self._by_size: dict[tuple[int, ...], list[tuple[int, Sample]]] = {}
        """The bucket with the oldest sample stands first: a bucket that was emptied begins anew behind all others."""
        self._pixels = 0

    def add(self, position: int, sample: Sample) -> Iterator[list[tuple[int, Sample]]]:
        """Take in a sample; the batches that are to be made now."""
        bucket = self._by_size.setdefault(sample.pixels.shape, [])
        bucket.append((position, sample))
        self._pixels += sample.area
        if (len(bucket) + 1) * sample.area > BATCH_PIXELS:
            yield self._take(sample.pixels.shape)
        while self._by_size:
            oldest, samples = next(iter(self._by_size.items()))
            if self._pixels <= WINDOW_PIXELS and position - samples[0][0] < WINDOW_SAMPLES:
                return
            yield self._take(oldest)

    def flush(self) -> Iterator[list[tuple[int, Sample]]]:
        """Batches of all that is left."""
        for size in list(self._by_size):
            yield self._take(size)

    def _take(self, size: tuple[int, ...]) -> list[tuple[int, Sample]]:
        samples = self._by_size.pop(size)
        self._pixels -= sum(sample.area for _, sample in samples)
        return samples


def encode_batches(
    batches: Channel[Batch | Message], encoder: Encoder, results: Channel[Message], clock: Clock
) -> None:
    """Encode batch after batch, and pass everything on in order. On a GPU, one batch is on its way while the next is
    launched. The clock gets "encode", "encoder waits" (for a batch) and "encoder held up" (by the writer)."""
    launched: deque[Message | tuple[Batch, list[tuple[int, Pending]]]] = deque()

    def pass_on(most: int) -> None:
        """Pass on from the front, until at most `most` launched batches are left."""
        while launched and (
            not isinstance(launched[0], tuple) or sum(isinstance(entry, tuple) for entry in launched) > most
        ):
            entry, weight = launched.popleft(), 0
            if isinstance(entry, tuple):
                with clock.busy("encode"):
                    entry, weight = collect(*entry)
            with clock.busy("encoder held up"):
                results.put(entry, weight)

    while True:
        if not batches.ready():
            pass_on(0)
        with clock.busy("encoder waits"):
            message = next(batches, None)
        if message is None:
            break
        if isinstance(message, Batch):
            with clock.busy("encode"):
                launched.append((message, encoder.launch(message.pixels)))
        else:
            launched.append(message)
        pass_on(1 if encoder.on_gpu else 0)
    pass_on(0)
    results.finish()


def collect(batch: Batch, parts: list[tuple[int, Pending]]) -> tuple[Results, int]:
    """The results of a batch, and their bytes."""
    results: list[tuple[int, Result]] = []
    weight = 0
    for images, pending in parts:
        latents = pending()
        for i in range(images):
            about = batch.abouts[len(results)]
            result = outcome(about, latents, i)
            weight += len(about.jpeg or b"") + (result.latents.nbytes if isinstance(result, Encoded) else 0)
            results.append((batch.positions[len(results)], result))
    return Results(results), weight


def outcome(about: About, latents: Latents | None, i: int) -> Encoded | Failure:
    """The result of the `i`-th image of a batch."""
    item = about.item
    if latents is None:
        reason = "does not fit into the device's memory, even alone; lower encode.max_tokens"
    elif not latents[1][i]:
        reason = f"its latent is not finite in {str(latents[0].dtype).removeprefix('torch.')}"
    else:
        return Encoded(about, latents[0][i])
    return Failure(item.name, reason, item.label, about.rendition)
