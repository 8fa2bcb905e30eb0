import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from typer.testing import CliRunner

from data_prep import commits as commits_module
from data_prep import finish as finish_module
from data_prep import recipe as recipe_module
from data_prep.commits import commit_partition, read_commit
from data_prep.encode import CATALOG, JobOptions, encode
from data_prep.encoder import to_float
from data_prep.job import Share, parse_share
from data_prep.prepare import EncodeConfig
from nitscale.autoencoders import DCTCodec
from nitscale.cli import app
from nitscale.data.manifest import load_dataset
from nitscale.data.storage import open_storage
from nitscale.errors import UserError
from tests.data_prep.pictures import make_folder, png

CONFIG = EncodeConfig(factor=8, channels=6, shard_samples=2)


def run(images, output, config=CONFIG, **options):
    source = {name: options.pop(name) for name in ("kind", "captions", "codec", "codec_dtype") if name in options}
    return encode(images, output, config, options=JobOptions(progress=False, workers=2, **options), **source)


def contents(output):
    """Every file of a dataset, with its bytes."""
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


@pytest.fixture
def images(tmp_path):
    """Eight good images of two classes: four partitions."""
    return make_folder(tmp_path / "images")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The dataset that one job makes of the images of the fixture `images`."""
    folder = tmp_path_factory.mktemp("reference")
    run(make_folder(folder / "images"), folder / "out")
    return contents(folder / "out")


def break_image(path):
    """Damage an image without changing its size; a function that mends it."""
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    return lambda: path.write_bytes(data)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_the_jobs_of_an_array_in_any_order_make_what_one_job_makes(images, tmp_path, reference, of):
    for job in reversed(range(of)):
        report = run(images, tmp_path / "out", share=Share(job, of))
        assert report.partitions == len([p for p in range(4) if p % of == job])
        assert report.digest is None
        assert "run --finish" in report.summary()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(images, tmp_path / "out", only="finish").digest == load_dataset(tmp_path / "out").manifest.digest
    assert contents(tmp_path / "out") == reference


SLURM = {"ID": "2", "MIN": "1", "MAX": "2", "COUNT": "2"}


def test_the_command_line_passes_everything_on(images, tmp_path):
    """Three jobs as SLURM starts them, and the last one that finishes."""
    flags = "--kind folder --resize native,square-16 --factor 8 --channels 6 --dtype bfloat16 --no-flips --jpeg --text"
    flags += " --shard-samples 4 --max-tokens 9 --patch-size 2 --workers 2 --device cpu --max-failures 0.5"
    command = ["encode", str(images), str(tmp_path / "out"), *flags.split()]
    for arguments in (["--prepare"], ["--job", "0", "--of", "2"], ["--job", "slurm"], ["--retry-failed", "--finish"]):
        environment = {f"SLURM_ARRAY_TASK_{name}": value for name, value in SLURM.items()}
        result = CliRunner().invoke(app, command + arguments, env=environment)
        assert result.exit_code == 0, result.output
    samples, dataset = read_samples(tmp_path / "out")
    manifest = dataset.manifest
    assert (manifest.renditions, manifest.members) == (["native", "square-16"], ["image", "text"])
    assert (manifest.dtype, manifest.flips, manifest.factor, manifest.channels) == ("bfloat16", False, 8, 6)
    assert (len(samples), manifest.samples) == (16, 16)
    assert (dataset.index.rows * dataset.index.columns).max() <= 9 * 4
    assert not ((dataset.index.rows | dataset.index.columns) % 2).any()


def test_finish_refuses_and_lists_the_partitions_that_are_missing(images, tmp_path):
    run(images, tmp_path / "out", share=Share(1, 2))
    with pytest.raises(UserError, match=r"not complete: 2 of 4 partitions are missing \(000000, 000002\)"):
        run(images, tmp_path / "out", only="finish")
    assert not (tmp_path / "out" / "manifest.json").exists()
    (shard,) = (tmp_path / "out" / "shards").glob("000003-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"3 of 4 partitions are missing \(000000, 000002, 000003\)"):
        run(images, tmp_path / "out", only="finish")


def test_finish_before_anything_was_begun_is_refused(images, tmp_path):
    with pytest.raises(UserError, match=r"nothing was begun in .*out; run the command without --finish first"):
        run(images, tmp_path / "out", only="finish")


def test_finish_with_other_settings_is_refused(images, tmp_path):
    run(images, tmp_path / "out")
    with pytest.raises(UserError, match=r"encode\.jpeg is True, was False"):
        run(images, tmp_path / "out", replace(CONFIG, jpeg=True), only="finish")


def test_prepare_writes_the_recipe_and_makes_no_partition(images, tmp_path, reference):
    report = run(images, tmp_path / "out", only="prepare")
    assert (report.samples, report.partitions) == (0, 4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["encode.json"]
    run(images, tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_jobs_that_begin_at_once_agree_on_one_recipe(images, tmp_path, reference, monkeypatch):
    """The other job has written its recipe, with statistics of its own, while this one took its own."""
    fit, other = recipe_module.fit_dct, DCTCodec(8, 6, [0.5] * 6, [2.0] * 6)

    def slow(*arguments):
        mine = fit(*arguments)
        theirs = json.loads(reference["encode.json"]) | {"codec": other.spec()}
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "encode.json").write_text(json.dumps(theirs))
        return mine

    monkeypatch.setattr(recipe_module, "fit_dct", slow)
    run(images, tmp_path / "out")
    assert load_dataset(tmp_path / "out").manifest.codec == other.spec()


@pytest.mark.parametrize(
    ("job", "of", "environment", "share"),
    [
        (None, None, {}, None),
        (None, None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, None),
        ("0", 1, {}, Share(0, 1)),
        ("3", 4, {}, Share(3, 4)),
        ("slurm", None, {"ID": "5", "MIN": "1", "MAX": "16", "COUNT": "16"}, Share(4, 16)),
        ("slurm", 16, {"ID": "5"}, Share(5, 16)),
    ],
)
def test_the_share_of_a_job(job, of, environment, share):
    assert parse_share(job, of, {f"SLURM_ARRAY_TASK_{name}": value for name, value in environment.items()}) == share


@pytest.mark.parametrize(
    ("job", "of", "environment", "message"),
    [
        ("4", 4, {}, r"there is no job 4 of 4; jobs are counted from 0 to 3 .*--array=0-3"),
        ("-1", 4, {}, "there is no job -1 of 4"),
        ("one", 4, {}, "'one' is neither a number, counted from 0, nor slurm"),
        ("1", None, {}, "--job 1 needs --of"),
        (None, 4, {}, "--of 4 needs --job"),
        ("slurm", None, {}, "needs 'SLURM_ARRAY_TASK_ID', which SLURM sets"),
        ("slurm", None, {"ID": "7", "MIN": "3", "MAX": "7", "COUNT": "2"}, "2 tasks from 3 to 7.*give --of"),
    ],
)
def test_a_share_that_cannot_be_is_refused(job, of, environment, message):
    with pytest.raises(UserError, match=message):
        parse_share(job, of, {f"SLURM_ARRAY_TASK_{name}": value for name, value in environment.items()})


def test_a_job_passes_over_what_another_has_committed_meanwhile(images, tmp_path, reference, monkeypatch):
    """Another job makes everything as soon as this one has looked what is missing."""
    read = commits_module.read_commits

    def looked(storage, names):
        result = read(storage, names)
        monkeypatch.undo()
        run(images, tmp_path / "out")
        return result

    monkeypatch.setattr("data_prep.encode.read_commits", looked)
    report = run(images, tmp_path / "out")
    assert (report.worked_images, report.reused_partitions) == (0, 4)
    assert contents(tmp_path / "out") == reference


class Rounding(DCTCodec):
    """The same codec on another machine: its latents differ in their last bits."""

    def __init__(self, machine):
        super().__init__(8, 6)
        self.machine = machine

    def encode(self, images):
        return super().encode(images) * (1 + self.machine / 1000)

    def spec(self):
        return DCTCodec(8, 6).spec()


def test_of_two_jobs_that_made_a_partition_at_once_the_first_to_commit_wins(images, tmp_path, monkeypatch):
    """The other machine commits every partition just before this one does."""
    commit = commit_partition
    run(images, tmp_path / "alone", codec=Rounding(1))

    def late(storage, *arguments):
        monkeypatch.setattr("data_prep.writer.commit_partition", commit)
        run(images, tmp_path / "out", codec=Rounding(1))
        monkeypatch.setattr("data_prep.writer.commit_partition", commit_partition)
        return commit(storage, *arguments)

    monkeypatch.setattr("data_prep.writer.commit_partition", late)
    report = run(images, tmp_path / "out", codec=Rounding(2))
    assert report.reused_partitions == 4
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_job_that_comes_second_leaves_objects_that_the_winner_names(tmp_path):
    storage = open_storage(tmp_path)
    for name in ("shards/000000-00000001.tar", "index/000000-00000001.npz", "shards/000000-00000002.tar"):
        storage.write(name, b"x")

    def marker(*shards):
        entries = [
            {"tar": f"shards/000000-{n:08x}.tar", "index": f"index/000000-{n:08x}.npz", "bytes": 1, "index_bytes": 1}
            for n in shards
        ]
        return {"partition": "000000", "failures": [], "shards": entries}

    first = commit_partition(storage, marker(1), replace=False)
    assert commit_partition(storage, marker(1, 2), replace=False) == first == read_commit(storage, "000000")
    assert sorted(storage.list("shards")) == ["shards/000000-00000001.tar"]
    assert sorted(storage.list("index")) == ["index/000000-00000001.npz"]


def test_finish_removes_what_no_marker_names_and_nothing_else(images, tmp_path, reference):
    run(images, tmp_path / "out")
    stray = ["shards/000002-0badf00d.tar", "index/000001-0badf00d.npz"]
    kept = ["shards/notes.txt", "shards/000004-0badf00d.tar", "index/mine.npz"]
    for name in stray + kept:
        (tmp_path / "out" / name).write_bytes(b"x")
    run(images, tmp_path / "out", only="finish")
    assert set(contents(tmp_path / "out")) == {*reference, *kept}


def test_failed_images_can_be_tried_again_and_other_partitions_are_kept(images, tmp_path):
    codec = DCTCodec(8, 6)
    run(images, tmp_path / "whole", codec=codec)
    mend = break_image(images / "class-1" / "2.png")
    report = run(images, tmp_path / "out", codec=codec)
    assert [failure.source for failure in report.failures] == ["class-1/2.png"]
    assert report.samples == 7
    before = contents(tmp_path / "out")
    assert run(images, tmp_path / "out", codec=codec, retry_failed=True).samples == 7
    assert contents(tmp_path / "out") == before
    mend()
    assert run(images, tmp_path / "out", codec=codec).samples == 7
    report = run(images, tmp_path / "out", codec=codec, retry_failed=True)
    assert (report.samples, report.worked_images, report.reused_partitions) == (8, 2, 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_mended_image_may_have_another_size_but_not_another_name(images, tmp_path):
    path = images / "class-1" / "2.png"
    path.write_bytes(b"broken")
    run(images, tmp_path / "out")
    path.write_bytes(png(40, 40))
    with pytest.raises(UserError, match="images_digest is"):
        run(images, tmp_path / "out")
    assert run(images, tmp_path / "out", retry_failed=True).failures == ()
    assert run(images, tmp_path / "out").samples == 8
    path.rename(path.with_name("3a.png"))
    with pytest.raises(UserError, match="names_digest is"):
        run(images, tmp_path / "out", retry_failed=True)


def test_retried_partitions_replace_their_marker_also_if_a_job_is_killed_in_between(images, tmp_path, monkeypatch):
    mend = break_image(images / "class-1" / "2.png")
    run(images, tmp_path / "out")
    mend()

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.writer.commit_partition", killed)
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / "out", retry_failed=True)
    assert load_dataset(tmp_path / "out").index.num_samples == 7
    assert run(images, tmp_path / "out").samples == 7
    assert run(images, tmp_path / "out", retry_failed=True).samples == 8


@pytest.fixture
def few_tolerated(monkeypatch):
    monkeypatch.setattr(finish_module, "TOLERATED", 0)


def test_too_many_failures_end_the_job_with_its_markers_written(images, tmp_path, few_tolerated):
    for path in sorted(images.glob("*/*"))[:3]:
        break_image(path)
    with pytest.raises(
        UserError, match=r"[23] of 8 images cannot be used \([23] x not a JPEG.*the 20\.00% of --max-failures"
    ):
        run(images, tmp_path / "out", max_failures=0.2)
    made = list((tmp_path / "out" / "commits").iterdir())
    assert made
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match="of 8 images cannot be used"):
        run(images, tmp_path / "out", max_failures=0.2)
    assert list((tmp_path / "out" / "commits").iterdir()) == made  # it is not begun in vain
    report = run(images, tmp_path / "out", max_failures=0.5)
    assert (report.samples, len(report.failures)) == (5, 3)


def test_a_job_of_an_array_judges_its_own_failures(images, tmp_path, few_tolerated):
    for path in images.glob("*/*"):
        break_image(path)
    good = png(16, 16)
    for path in sorted(images.glob("*/*"))[:1]:
        path.write_bytes(good)
    with pytest.raises(UserError, match="images cannot be used"):
        for job in range(4):
            run(images, tmp_path / "out", share=Share(job, 4), max_failures=0.4)


def read_samples(output):
    """All samples as webdataset reads them, and the whole dataset by its index."""
    dataset = load_dataset(output)
    shards = [str(output / shard["tar"]) for shard in dataset.manifest.shards]
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)), dataset


def test_several_rules_give_a_sample_each_with_the_pixels_beside_the_latents(images, tmp_path):
    config = EncodeConfig(factor=8, channels=192, resize=("native", "square-16"), jpeg=True, shard_samples=4)
    report = run(images, tmp_path / "out", config)
    assert report.renditions == {"native": 8, "square-16": 8}
    samples, dataset = read_samples(tmp_path / "out")
    assert (dataset.manifest.renditions, dataset.manifest.members) == (["native", "square-16"], ["image"])
    codec = dataset.codec()
    keys = {path.relative_to(images).with_suffix("").as_posix() for path in images.glob("*/*")}
    assert {sample["__key__"] for sample in samples} == {f"{k}-{r}" for k in keys for r in ("native", "square-16")}
    for i, sample in enumerate(samples):
        about = json.loads(sample["json"])
        assert about["key"] == sample["__key__"] == dataset.index.key(i)
        assert about["rendition"] == config.resize[dataset.index.rendition[i]]
        assert about["class"] == dataset.manifest.classes[about["label"]] == about["source"].split("/")[0]
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            assert image.layer[0][1:3] == (1, 1)  # no chroma subsampling
            pixels = torch.from_numpy(np.asarray(image).copy())
        assert list(pixels.shape[:2]) == [8 * side for side in about["grid"]]
        if about["rendition"] == "square-16":
            assert about["grid"] == [2, 2]
        with Image.open(images / about["source"]) as original:
            assert about["image_size"] == [original.height, original.width]
        decoded = codec.decode(dataset.latent(i).float()[None])[0]
        assert (decoded - to_float(pixels[None])[0]).abs().mean() < 0.05


@pytest.mark.parametrize(("dtype", "flips"), [("bfloat16", True), ("float16", False), ("float32", False)])
def test_latents_are_stored_as_asked(images, tmp_path, dtype, flips):
    run(images, tmp_path / "out", replace(CONFIG, dtype=dtype, flips=flips))
    dataset = load_dataset(tmp_path / "out")
    assert (dataset.manifest.dtype, dataset.manifest.flips) == (dtype, flips)
    assert dataset.index.crc32c.shape == (8, 1 + flips)
    assert str(dataset.latent(0, flipped=flips).dtype) == f"torch.{dtype}"


def make_tars(folder, tars=2, samples=5, texts=(), labels=True):
    """A WebDataset of images, with captions for the samples in `texts`."""
    folder.mkdir()
    for number in range(tars):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for i in range(samples):
                members = {"png": png(24, 16 + 8 * (i % 2), seed=i)}
                members |= {"cls": str(i % 3).encode()} if labels else {}
                members |= {"txt": f"caption {number}/{i}".encode()} if (number, i) in texts else {}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def test_a_tar_of_many_images_gives_several_shards(tmp_path):
    report = run(make_tars(tmp_path / "tars"), tmp_path / "out")
    assert (report.partitions, report.shards, report.samples) == (2, 6, 10)
    samples, dataset = read_samples(tmp_path / "out")
    assert len({sample["__key__"] for sample in samples}) == 10
    assert dataset.manifest.classes == ["0", "1", "2"]
    assert sorted(dataset.index.label.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert {shard["tar"][:14] for shard in dataset.manifest.shards} == {"shards/000000-", "shards/000001-"}


def test_captions_are_stored_where_the_first_images_have_one_and_are_empty_where_there_is_none(tmp_path):
    report = run(make_tars(tmp_path / "tars", texts=[(0, 1), (1, 4)]), tmp_path / "out")
    assert report.without_text == 8
    samples, dataset = read_samples(tmp_path / "out")
    assert dataset.manifest.members == ["text"]
    texts = {sample["__key__"]: sample["txt"].decode() for sample in samples}
    assert sorted(texts.values()) == [""] * 8 + ["caption 0/1", "caption 1/4"]
    assert [texts[key] for key in texts if key.endswith("000/0001")] == ["caption 0/1"]


def test_captions_that_come_late_are_counted_and_stored_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_module, "FIRST_CAPTIONS", 3)
    tars = make_tars(tmp_path / "tars", texts=[(1, 4)])
    report = run(tars, tmp_path / "out")
    assert (report.dropped_text, load_dataset(tmp_path / "out").manifest.members) == (1, [])
    assert "captions dropped" in report.summary()
    run(tars, tmp_path / "asked", replace(CONFIG, text=True))
    assert load_dataset(tmp_path / "asked").manifest.members == ["text"]


def test_a_damaged_tar_costs_its_own_partition_only(tmp_path):
    tars = make_tars(tmp_path / "tars", tars=3)
    path = tars / "001.tar"
    whole = path.read_bytes()
    header = whole.index(b"0003.png")
    path.write_bytes(whole[:header] + bytes([whole[header] ^ 1]) + whole[header + 1 :])
    with pytest.raises(UserError, match=r"1 of 3 partitions cannot be read.*001\.tar"):
        run(tars, tmp_path / "out")
    assert len(list((tmp_path / "out" / "commits").iterdir())) == 2
    assert len(list((tmp_path / "out" / "shards").iterdir())) == 6
    path.write_bytes(whole)
    report = run(tars, tmp_path / "out")
    assert (report.samples, report.reused_partitions) == (15, 2)


def test_the_tars_of_imagenet_are_scanned_once(tmp_path, monkeypatch):
    folder = tmp_path / "tars"
    folder.mkdir()
    for label in range(2):
        with tarfile.open(folder / f"n0000000{label}.tar", "w") as tar:
            for i in range(3):
                info = tarfile.TarInfo(f"n0000000{label}_{i}.JPEG")
                data = png(16, 16, seed=i)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    run(folder, tmp_path / "out", only="prepare")
    assert (tmp_path / "out" / CATALOG).exists()
    monkeypatch.setattr("data_prep.sources.scan_class_tars", None)
    assert run(folder, tmp_path / "out").samples == 6
    assert load_dataset(tmp_path / "out").manifest.classes == ["n00000000", "n00000001"]
    (tmp_path / "out" / CATALOG).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"catalog.*out/catalog\.npz"):
        run(folder, tmp_path / "out")


def test_sixteen_jobs_racing_for_the_same_partitions_commit_each_once(images, tmp_path):
    with ThreadPoolExecutor(16) as pool:
        reports = list(pool.map(lambda i: run(images, tmp_path / "out", codec=Rounding(i)), range(16)))
    assert {report.samples for report in reports} == {8}
    run(images, tmp_path / "out", codec=Rounding(0), only="finish")
    samples, dataset = read_samples(tmp_path / "out")
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 8
    for i in range(8):
        dataset.latent(i)  # checks its crc32c
    assert len(list((tmp_path / "out" / "shards").iterdir())) == 4
    assert len(list((tmp_path / "out" / "index").iterdir())) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_failures": 2.0}, "--max-failures is a share from 0 to 1, got 2.0"),
        ({"only": "finish", "share": Share(0, 2)}, "--finish is for all partitions"),
        ({"workers": 0}, "at least one worker"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"device": "cuda"}, "no GPU for --device cuda"),
    ],
)
def test_options_that_cannot_be_are_refused(images, tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        encode(images, tmp_path / "out", CONFIG, options=JobOptions(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": ()}, "name every resize rule once"),
        ({"resize": ("native", "native")}, "name every resize rule once"),
        ({"resize": ("round-3",)}, "unknown resize rule 'round-3'"),
        ({"resize": ("square-20",)}, "20 is not a multiple of 8"),
        ({"dtype": "int8"}, "dtype is one of float16, bfloat16, float32, got 'int8'"),
    ],
)
def test_a_dataset_that_cannot_be_is_refused_before_anything_is_written(images, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(images, tmp_path / "out", replace(CONFIG, **change))
    assert not (tmp_path / "out").exists()


def test_labels_that_are_no_classes_are_refused(images, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for suffix, data in (("png", png(16, 16)), ("cls", b"1234567890")):
            info = tarfile.TarInfo(f"a.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match="1,234,567,890 stands for more than 1,048,576 classes"):
        run(tars, tmp_path / "out")
