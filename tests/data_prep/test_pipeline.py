import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep import pipeline
from data_prep.encoder import Encoder, to_float
from data_prep.items import ImageItem, Partition
from data_prep.pipeline import (
    Batch,
    Buckets,
    Encoded,
    PartitionEnd,
    PartitionStart,
    Results,
    encode_batches,
    start_pipeline,
)
from data_prep.prepare import About, EncodeConfig, Failure, Sample, preparation
from data_prep.stages import Budget, Channel, Clock, OrderedWork, Stages, Stopped
from nitscale.autoencoders import DCTCodec
from nitscale.errors import UserError
from tests.data_prep.pictures import png

CPU = torch.device("cpu")


def test_a_full_channel_holds_its_sender_back_and_keeps_the_order():
    channel, sent = Channel(limit=3), []

    def send():
        for i in range(10):
            sent.append(i)
            channel.put(i)
        channel.finish()

    with Stages() as stages:
        stages.add(channel)
        stages.start("send", send)
        received = []
        for item in channel:
            # three in the channel, one that was just taken, and one that waits to be put
            assert len(sent) <= item + 5
            received.append(item)
    assert received == list(range(10))


def test_a_channel_lets_a_single_item_pass_that_is_heavier_than_its_limit():
    channel = Channel(limit=1)
    channel.put("heavy", 100)
    assert next(channel) == "heavy"


def test_results_of_several_threads_come_in_the_order_of_the_work():
    work, later = OrderedWork(8, Budget(1)), threading.Event()

    def first():
        assert later.wait(60)
        return 0

    with Stages() as stages:
        stages.add(work)
        for number in range(2):
            stages.start(f"work {number}", work.work)
        work.put(first)
        work.put(lambda: later.set() or 1)
        work.put(lambda: 2)
        work.finish()
        assert list(work) == [0, 1, 2]


def test_an_error_in_a_thread_ends_all_others_and_is_raised():
    channel, full, budget = Channel(), Channel(limit=1), Budget(1)
    work = OrderedWork(1, budget)
    ended = []

    def until_stopped(name, function):
        try:
            function()
        except Stopped:
            ended.append(name)
            raise

    def fail():
        raise UserError("the disk is full")

    full.put("one")
    budget.spend(1)
    with pytest.raises(UserError, match="the disk is full"), Stages() as stages:
        for item in (channel, full, budget, work):
            stages.add(item)
        stages.start("get", lambda: until_stopped("get", lambda: next(channel)))
        stages.start("put", lambda: until_stopped("put", lambda: full.put("two")))
        stages.start("wait", lambda: until_stopped("wait", budget.wait))
        stages.start("fail", fail)
        next(work)
    assert sorted(ended) == ["get", "put", "wait"]


def test_an_error_in_the_main_thread_ends_all_threads():
    channel = Channel()
    with pytest.raises(KeyboardInterrupt), Stages() as stages:
        stages.add(channel)
        stages.start("get", lambda: next(channel))
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name == "get"]


def sample(height, width):
    return Sample(About(None, "native", (height, width), None), np.empty((height, width, 3), np.uint8))


@given(
    sizes=st.lists(st.sampled_from([(8, 8), (8, 16), (16, 8), (32, 32), (64, 64)]), max_size=60),
    batch=st.sampled_from([1, 200, 2000]),
    window=st.sampled_from([1, 500, 5000]),
    span=st.sampled_from([1, 5, 100]),
)
def test_batches_hold_every_sample_once_and_keep_to_the_limits(sizes, batch, window, span):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BATCH_PIXELS", batch)
        patch.setattr(pipeline, "WINDOW_PIXELS", window)
        patch.setattr(pipeline, "WINDOW_SAMPLES", span)
        buckets, made = Buckets(), []
        for position, size in enumerate(sizes):
            made += buckets.add(position, sample(*size))
            held = set(range(position + 1)) - {p for samples in made for p, _ in samples}
            assert sum(sizes[p][0] * sizes[p][1] for p in held) <= window
            assert not held or position - min(held) < span
        made += buckets.flush()
    assert sorted(position for samples in made for position, _ in samples) == list(range(len(sizes)))
    for samples in made:
        (shape,) = {one.pixels.shape for _, one in samples}
        assert len(samples) == 1 or len(samples) * shape[0] * shape[1] <= batch
        assert all(a < b for (a, _), (b, _) in pairwise(samples))


def test_equal_sizes_are_batched_together_over_the_window():
    buckets = Buckets()
    made = [samples for i in range(12) for samples in buckets.add(i, sample(8, 8 if i % 2 else 16))]
    made += buckets.flush()
    assert [[position for position, _ in samples] for samples in made] == [[*range(0, 12, 2)], [*range(1, 12, 2)]]


class SmallMemory:
    """The DCT codec on a device that holds `most` images at once, mirror images counted."""

    factor, channels = 8, 6

    def __init__(self, most):
        self.most, self.codec, self.batches = most, DCTCodec(8, 6), []

    def encode(self, images):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(images))
        return self.codec.encode(images)


def pixels(images, height=16, width=24):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (images, height, width, 3), dtype=np.uint8))


def collected(parts):
    return torch.cat([pending()[0] for _, pending in parts])


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_so_are_later_ones():
    x = pixels(10)
    codec = SmallMemory(most=6)
    encoder = Encoder(codec, CPU)
    parts = encoder.launch(x)
    assert [images for images, _ in parts] == [2, 2, 1, 2, 2, 1]
    torch.testing.assert_close(collected(parts), collected(Encoder(DCTCodec(8, 6), CPU).launch(x)))
    codec.batches.clear()
    encoder.launch(x)
    assert max(codec.batches) <= 6
    assert sum(codec.batches) == 20  # none was tried in vain
    encoder.launch(pixels(40, 8, 8))
    assert max(codec.batches) <= 6


def test_an_image_and_its_mirror_image_are_encoded_one_by_one_if_only_one_fits():
    x = pixels(3)
    parts = Encoder(SmallMemory(most=1), CPU).launch(x)
    torch.testing.assert_close(collected(parts), collected(Encoder(DCTCodec(8, 6), CPU).launch(x)))


def test_latents_are_those_of_the_image_and_of_its_mirror_image():
    x, codec = pixels(2), DCTCodec(8, 6)
    ((_, both),) = Encoder(codec, CPU, "float32").launch(x)
    ((_, alone),) = Encoder(codec, CPU, "float32", flips=False).launch(x)
    torch.testing.assert_close(both()[0][:, 0], codec.encode(to_float(x)))
    torch.testing.assert_close(both()[0][:, 1], codec.encode(to_float(x).flip(-1)))
    torch.testing.assert_close(alone()[0][:, 0], both()[0][:, 0])
    assert alone()[0].shape[1] == 1


def item(name, read, text=None):
    return ImageItem(name, name, 0, text, read)


class Images:
    """A source of PNG files in memory. A partition of None fails in its middle."""

    classes, digest, ignored = ("image",), "", {}

    def __init__(self, *sizes):
        self.sizes, self.read = sizes, Counter()

    def partitions(self, images):
        return [Partition(f"{i}", None if sizes is None else len(sizes), i) for i, sizes in enumerate(self.sizes)]

    def items(self, partition):
        sizes = self.sizes[partition.start]
        for i, size in enumerate([(16, 16)] if sizes is None else sizes):

            def read(i=i, size=size):
                self.read[partition.name] += 1
                return png(*size, seed=i)

            yield item(f"{partition.name}/{i}", read)
        if sizes is None:
            raise UserError("images: the tar is damaged")


class OnGPU(Encoder):
    """Behaves as on a GPU, where latents come later: keeps a diary."""

    diary: list

    @property
    def on_gpu(self):
        return True

    def stack(self, images):
        return torch.from_numpy(np.stack(images))

    def launch(self, pixels):
        number = sum(what == "launch" for what, _ in self.diary)
        self.diary.append(("launch", number))
        latents = torch.zeros(len(pixels), 1, 1, 1, 1), torch.ones(len(pixels), dtype=torch.bool)

        def wait():
            self.diary.append(("collect", number))
            return latents

        return [(len(pixels), wait)]


def run(source, encoder, config=None, workers=2):
    """All messages of the pipeline, and its clock."""
    clock = Clock()
    prepare = preparation(config or EncodeConfig(), 8, clock)
    results = Channel()
    with Stages() as stages:
        partitions = list(enumerate(source.partitions(10)))
        batches = start_pipeline(stages, partitions, source, prepare, encoder, workers)
        encode_batches(batches, encoder, results, clock)
    return list(results), clock.seconds()


def shape_of(messages):
    """The messages without what is in them, neighbouring results as one."""
    names = [type(message).__name__ for message in messages]
    return [name for i, name in enumerate(names) if i == 0 or name != "Results" or names[i - 1] != "Results"]


def test_everything_comes_out_between_the_boundaries_of_its_partition():
    sizes = [[(16, 16)] * 3 + [(16, 32)] * 2, [(32, 16)], []]
    messages, seconds = run(Images(*sizes), Encoder(DCTCodec(8, 6), CPU))
    assert shape_of(messages) == ["PartitionStart", "Results", "PartitionEnd"] * 2 + ["PartitionStart", "PartitionEnd"]
    number, found = -1, {}
    for message in messages:
        if isinstance(message, PartitionStart):
            number = message.number
        elif isinstance(message, Results):
            found |= {(number, position): result for position, result in message.results}
        else:
            assert message == PartitionEnd(len(sizes[number]))
    assert {(n, i) for n, part in enumerate(sizes) for i in range(len(part))} == set(found)
    for (n, i), result in found.items():
        assert result.about.item.name == f"{n}/{i}"
        assert result.latents.shape == (2, 6, sizes[n][i][0] // 8, sizes[n][i][1] // 8)
    assert {"read", "decode", "resize", "encode", "encoder waits"} <= set(seconds)


def test_on_a_gpu_the_next_batch_is_launched_before_the_last_is_collected(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_PIXELS", 1)
    encoder = OnGPU(DCTCodec(8, 6), CPU)
    encoder.diary = []
    clock, batches, results = Clock(), Channel(), Channel()
    about = About(item("a", bytes), "native", (8, 8), None)
    for position in range(3):
        batches.put(Batch([position], [about], pixels(1)))
    batches.put(PartitionEnd(3))
    batches.finish()
    encode_batches(batches, encoder, results, clock)
    expected = [("launch", 0), ("launch", 1), ("collect", 0), ("launch", 2), ("collect", 1), ("collect", 2)]
    assert encoder.diary == expected
    messages = list(results)
    assert [message.results[0][0] for message in messages[:3]] == [0, 1, 2]
    assert messages[3] == PartitionEnd(3)


def test_what_was_launched_is_passed_on_before_the_encoder_waits_for_more():
    encoder = OnGPU(DCTCodec(8, 6), CPU)
    encoder.diary = []
    batches, results = Channel(), Channel()
    about = About(item("a", bytes), "native", (8, 8), None)
    with Stages() as stages:
        stages.add(batches)
        stages.add(results)
        batches.put(Batch([0], [about], pixels(1)))
        # The second batch comes when the first is through: with it held back, this would never end.
        stages.start("send", lambda: (next(results), batches.put(Batch([1], [about], pixels(1))), batches.finish()))
        encode_batches(batches, encoder, results, Clock())
    assert len(list(results)) == 1


def test_decoding_does_not_run_away_from_the_encoder(monkeypatch):
    for name, value in {"AHEAD_PIXELS": 512, "WINDOW_PIXELS": 512, "BATCH_PIXELS": 256}.items():
        monkeypatch.setattr(pipeline, name, value)
    source, done, most = Images([(16, 16)] * 60, [(16, 16)] * 60), Counter(), 0

    class Observed(Encoder):
        def launch(self, pixels):
            nonlocal most
            most = max(most, sum(source.read.values()) - done["images"])
            done["images"] += len(pixels)
            return super().launch(pixels)

    run(source, Observed(DCTCodec(8, 6), CPU))
    assert done["images"] == 120
    # 2 decoded and waiting, 2 threads at work, 1 that was let through, 2 in the window, 2 batches, 1 being batched
    assert most <= 10


def test_an_image_that_fails_is_told_once_for_all_rules_and_a_rule_that_fails_for_itself():
    class Broken(Images):
        def items(self, partition):
            yield item("broken", lambda: b"nothing")
            yield item("gone", Path("/nonexistent").read_bytes)
            yield item("wide", lambda: png(16, 900))

    config = EncodeConfig(resize=("native", "square-16"), max_tokens=64, max_aspect_ratio=100)
    messages, _ = run(Broken([]), Encoder(DCTCodec(8, 6), CPU), config)
    results = dict(entry for message in messages if isinstance(message, Results) for entry in message.results)
    assert results[0] == Failure("broken", "not a JPEG, PNG or WebP file", 0)
    assert results[1] is results[3] is None
    assert results[2] == Failure("gone", "cannot be read: No such file or directory", 0)
    assert isinstance(results[5], Encoded)
    assert isinstance(results[4], (Failure, Encoded))


def test_a_source_that_fails_ends_the_job_if_it_is_the_store():
    class Down(Images):
        def items(self, partition):
            def read():
                raise UserError("storage: gave up")

            yield item("a", read)

    with pytest.raises(UserError, match="gave up"):
        run(Down([]), Encoder(DCTCodec(8, 6), CPU))


def test_a_partition_that_cannot_be_read_is_given_up_and_the_next_one_made():
    messages, _ = run(Images([(16, 16)], None, [(16, 16)]), Encoder(DCTCodec(8, 6), CPU))
    ends = [message for message in messages if isinstance(message, PartitionEnd)]
    assert [end.images for end in ends] == [1, 1, 1]
    assert [str(end.error) for end in ends] == ["None", "images: the tar is damaged", "None"]


def test_two_partitions_in_a_row_that_cannot_be_read_end_the_job():
    with pytest.raises(UserError, match="the tar is damaged"):
        run(Images(None, None, [(16, 16)]), Encoder(DCTCodec(8, 6), CPU))
