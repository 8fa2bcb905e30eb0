import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import pipeline, writer
from data_prep.encode import encode_folder
from data_prep.encoder import Encoder, to_float
from data_prep.prepare import EncodeConfig
from nitscale import files
from nitscale.autoencoders import DCTCodec
from nitscale.data.manifest import load_dataset
from nitscale.errors import UserError
from tests.data_prep.pictures import make_folder, picture

CONFIG = EncodeConfig(shard_samples=3)


def encode(images, output, config=CONFIG, **options):
    return encode_folder(images, output, config, progress=False, **options)


def contents(output):
    """Every file of a dataset but the lock, with its bytes."""
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file() and p.name != ".lock"}


def object_of(output, kind, partition):
    """The file of one partition: its shard, index or marker."""
    return next((output / kind).glob(f"{partition:06d}*"))


@pytest.fixture
def images(tmp_path):
    """Eight good images of two classes."""
    return make_folder(tmp_path / "images")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What an encode that nothing disturbed makes of the images of the fixture `images`."""
    folder = tmp_path_factory.mktemp("reference")
    encode(make_folder(folder / "images"), folder / "out")
    return contents(folder / "out")


def test_every_image_is_in_the_dataset_with_its_class_and_mirror_image(images, tmp_path):
    report = encode(images, tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    assert (report.samples, report.shards, report.failures) == (8, 3, ())
    assert report.digest == dataset.manifest.digest
    assert report.tokens == dataset.manifest.tokens
    assert dataset.manifest.classes == ["class-0", "class-1"]
    codec = dataset.codec()
    for i in range(8):
        key = dataset.index.key(i)
        path = next(images.glob(f"{key}.*"))
        with Image.open(path) as image:
            height, width = image.height // 16 * 16, image.width // 16 * 16
            pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        assert (dataset.index.rows[i] * 16, dataset.index.columns[i] * 16) == (height, width)
        assert dataset.manifest.classes[dataset.index.label[i]] == key.split("/")[0]
        x = to_float(torch.from_numpy(pixels[None].copy()))
        for flipped, view in ((False, x), (True, x.flip(-1))):
            latent = dataset.latent(i, flipped)
            np.testing.assert_allclose(latent, codec.encode(view)[0].numpy(), atol=2e-2, rtol=2e-3)


def test_the_same_images_give_the_same_bytes_with_any_number_of_workers(images, tmp_path, reference):
    encode(images, tmp_path / "out", workers=5)
    assert contents(tmp_path / "out") == reference


def test_windows_and_batches_do_not_change_which_images_are_encoded(images, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_SAMPLES", 2)
    monkeypatch.setattr(pipeline, "BATCH_PIXELS", 1)
    assert encode(images, tmp_path / "out").samples == 8


def test_a_finished_dataset_is_left_as_it_is(images, tmp_path, reference):
    encode(images, tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "shards").iterdir()}
    report = encode(images, tmp_path / "out")
    assert report.reused_partitions == 3
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert contents(tmp_path / "out") == reference


@pytest.mark.parametrize("victim", ["shards", "index", "commits", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_rerun_makes_what_is_missing_or_cut_and_nothing_else(images, tmp_path, reference, victim, damage):
    encode(images, tmp_path / "out")
    path = tmp_path / "out" / victim
    path = path if path.is_file() else object_of(tmp_path / "out", victim, 1)
    data = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(data[: len(data) // 2])
    report = encode(images, tmp_path / "out")
    assert report.reused_partitions == (3 if victim == "manifest.json" else 2)
    assert contents(tmp_path / "out") == reference


def encode_and_die(images, output, at, before):
    """Encode, and kill this process before or after a file gets its `at`-th name."""
    names = count()

    def dying(give_name):
        def wrapped(source, target):
            here = next(names) == at
            if not (here and before):
                give_name(source, target)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    os.replace, os.link = dying(os.replace), dying(os.link)
    encode(images, output)
    os._exit(0)


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_at_any_file_leaves_no_dataset_and_the_next_run_ends_with_the_same_bytes(
    images, tmp_path, reference, before
):
    for at in count():
        output = tmp_path / f"out-{at}"
        process = multiprocessing.get_context("fork").Process(target=encode_and_die, args=(images, output, at, before))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if before or not (output / "manifest.json").exists():
            with pytest.raises(UserError, match="no dataset at"):
                load_dataset(output)
        else:
            load_dataset(output)
        encode(images, output)
        assert contents(output) == reference, at
    assert at > len(reference)


def test_ctrl_c_leaves_finished_partitions_and_the_next_run_continues(images, tmp_path, reference, monkeypatch):
    launch, batches, commit, committed = Encoder.launch, count(), writer.commit_partition, threading.Event()

    def interrupted(self, pixels):
        if next(batches) == 3:  # the first image of the second partition
            assert committed.wait(60)
            raise KeyboardInterrupt
        return launch(self, pixels)

    def observed(*arguments):
        result = commit(*arguments)
        committed.set()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "BATCH_PIXELS", 1)
        patch.setattr(Encoder, "launch", interrupted)
        patch.setattr(writer, "commit_partition", observed)
        with pytest.raises(KeyboardInterrupt):
            encode(images, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "commits").iterdir()] == ["000000.json"]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert encode(images, tmp_path / "out").reused_partitions == 1
    assert contents(tmp_path / "out") == reference


def test_a_disk_that_fills_up_at_any_file_is_an_error_and_a_later_run_continues(
    images, tmp_path, reference, monkeypatch
):
    fsync = files.fsync
    for at in range(2 * len(reference)):
        output, calls = tmp_path / f"out-{at}", count()

        def full(path, calls=calls, at=at):
            if next(calls) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            fsync(path)

        monkeypatch.setattr(files, "fsync", full)
        with pytest.raises(UserError, match=r"disk is full: cannot write .*free some space"):
            encode(images, output)
        monkeypatch.setattr(files, "fsync", fsync)
        assert not [p for p in output.rglob("*.tmp")]
        encode(images, output)
        assert contents(output) == reference


@pytest.fixture
def tiny_disk(tmp_path):
    """A folder on a real disk of 200 KiB. Skips where mounting one is not allowed."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or mount is None:
        pytest.skip("only root may mount a small disk")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_real_disk_that_is_full_is_an_error_and_leaves_no_half_file(tiny_disk, tmp_path):
    images = make_folder(tmp_path / "images", images=40)
    config = EncodeConfig(shard_samples=20, factor=4, channels=48)
    with pytest.raises(UserError, match=r"disk is full: cannot write .*shards/.*tar"):
        encode(images, tiny_disk / "out", config)
    assert not list(tiny_disk.rglob("*.tmp"))
    with pytest.raises(UserError, match="no dataset at"):
        load_dataset(tiny_disk / "out")


def test_a_read_only_output_is_an_error(images, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"not allowed to write .*read-only file system.*choose another folder"):
        encode(images, tmp_path / "out")


def test_an_output_that_is_a_file_is_an_error(images, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is in the way"):
        encode(images, tmp_path / "out")


def test_bad_images_are_skipped_counted_and_listed_with_reasons(images, tmp_path):
    truncated = images / "class-0" / "truncated.jpg"
    picture(64, 64).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-600])
    (images / "class-0" / "empty.png").write_bytes(b"")
    picture(3, 20000).save(images / "class-1" / "sliver.png")
    picture(1, 1).save(images / "class-1" / "dot.png")
    report = encode(images, tmp_path / "out", EncodeConfig(shard_samples=5))
    reasons = {failure.source: failure.reason for failure in report.failures}
    assert report.samples == 9  # the single pixel is stretched to one multiple, as NiT's rule says
    assert set(reasons) == {"class-0/truncated.jpg", "class-0/empty.png", "class-1/sliver.png"}
    assert "truncated" in reasons["class-0/truncated.jpg"].lower()
    assert "3 x 20000 pixels: aspect ratio 6667 is beyond encode.max_aspect_ratio=64" in reasons["class-1/sliver.png"]
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert {line["source"]: line["reason"] for line in map(json.loads, lines)} == reasons
    assert "3 images skipped" in report.summary()
    assert encode(images, tmp_path / "out", EncodeConfig(shard_samples=5)).failures == report.failures


def test_slivers_can_be_kept_up_to_the_token_limit(tmp_path):
    picture(3, 20000).save(make_folder(tmp_path / "images", classes=1) / "class-0" / "sliver.png")
    config = EncodeConfig(max_aspect_ratio=10000)
    assert encode(tmp_path / "images", tmp_path / "kept", config).samples == 5
    config = EncodeConfig(max_aspect_ratio=10000, max_tokens=1000)
    (failure,) = encode(tmp_path / "images", tmp_path / "skipped", config).failures
    assert failure.reason == "3 x 20000 pixels: 1250 tokens exceed encode.max_tokens=1000"


def test_large_images_are_scaled_down_to_the_token_limit(tmp_path):
    picture(300, 500).save(make_folder(tmp_path / "images", classes=1) / "class-0" / "large.png")
    encode(tmp_path / "images", tmp_path / "out", EncodeConfig(max_tokens=15, patch_size=2))
    index = load_dataset(tmp_path / "out").index
    tokens = (index.rows // 2) * (index.columns // 2)
    assert tokens.max() <= 15
    assert (index.rows % 2 == 0).all()
    assert (index.columns % 2 == 0).all()


def test_a_partition_without_a_readable_image_has_no_shard(images, tmp_path):
    for path in sorted(images.glob("*/*"))[1:7]:  # one of each class stays
        path.write_bytes(b"broken")
    report = encode(images, tmp_path / "out", EncodeConfig(shard_samples=1))
    assert (report.samples, report.shards, len(report.failures)) == (2, 2, 6)
    assert load_dataset(tmp_path / "out").index.num_samples == 2
    assert encode(images, tmp_path / "out", EncodeConfig(shard_samples=1)).reused_partitions == 8


def test_a_class_without_a_readable_image_is_an_error_and_no_dataset(images, tmp_path):
    for path in (images / "class-1").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"no image of class 'class-1' can be used \(class-1/0\.png: not a JPEG"):
        encode(images, tmp_path / "out")
    with pytest.raises(UserError, match="no dataset"):
        load_dataset(tmp_path / "out")


def test_a_folder_without_a_readable_image_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"none of the 1 images can be used \(a\.jpg: not a JPEG"):
        encode(tmp_path / "images", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": EncodeConfig(shard_samples=4)}, r"encode\.shard_samples is 4, was 3"),
        ({"config": EncodeConfig(shard_samples=3, channels=16)}, r"encode\.channels is 16, was 32"),
        ({"codec": DCTCodec(16, 32)}, "codec is '"),
    ],
)
def test_an_output_begun_with_other_settings_is_refused(images, tmp_path, change, message):
    encode(images, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        encode_folder(images, tmp_path / "out", **{"config": CONFIG, **change})


def test_an_output_begun_with_other_images_is_refused(images, tmp_path):
    encode(images, tmp_path / "out")
    picture(9, 9).save(images / "class-0" / "new.png")
    with pytest.raises(UserError, match=r"images is 9, was 8"):
        encode(images, tmp_path / "out")


def test_an_output_with_a_dataset_of_another_origin_is_refused(images, tmp_path):
    encode(images, tmp_path / "out")
    (tmp_path / "out" / "encode.json").unlink()
    with pytest.raises(UserError, match="already holds a dataset of another origin"):
        encode(images, tmp_path / "out")
    (tmp_path / "out" / "encode.json").write_text("{}")
    with pytest.raises(UserError, match=r"encode\.json is damaged"):
        encode(images, tmp_path / "out")


def test_an_output_within_the_image_folder_is_refused(images):
    with pytest.raises(UserError, match="lies in the source"):
        encode(images, images / "latents")
    assert not (images / "latents").exists()


def test_a_given_codec_is_used_and_its_parameters_recorded(images, tmp_path):
    codec = DCTCodec(8, 10).fit([torch.rand(4, 3, 32, 32)])
    encode(images, tmp_path / "out", codec=codec)
    dataset = load_dataset(tmp_path / "out")
    assert dataset.manifest.codec == codec.spec()
    assert dataset.manifest.channels == 10


@pytest.mark.parametrize("name", ["factor", "max_tokens", "shard_samples", "max_aspect_ratio"])
def test_impossible_settings_are_refused(images, tmp_path, name):
    with pytest.raises(UserError, match=rf"encode\.{name} must be at least 1, got 0"):
        encode(images, tmp_path / "out", EncodeConfig(**{name: 0}))


def test_latents_that_float16_cannot_hold_are_failures(images, tmp_path):
    codec = DCTCodec(16, 32, std=[1e-6] * 32)
    with pytest.raises(UserError, match="not finite in float16"):
        encode(images, tmp_path / "out", codec=codec)
