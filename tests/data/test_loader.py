import io
import os
import shutil
import signal
from dataclasses import replace
from itertools import islice

import numpy as np
import psutil
import pytest
import torch

from data_prep.encode import encode_folder
from data_prep.pipeline import EncodeConfig
from nitscale.data import loader as loader_module
from nitscale.data.foreign import index_dataset
from nitscale.data.loader import PackLoader, WorkerDied, decode_jpeg, feature_width, read_pack
from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Plan, PlanConfig
from nitscale.data.shards import ShardWriter, UnreadableSample
from nitscale.data.verify import verify_dataset
from nitscale.errors import UserError
from nitscale.layout import unpatchify
from tests.data.damage import damage, damage_member
from tests.data_prep.pictures import make_folder, picture

CONFIG = PlanConfig(seed=1, token_budget=64, packs_per_step=4, lanes=2)


@pytest.fixture(scope="module")
def dataset(shapes_dataset):
    return load_dataset(shapes_dataset)


@pytest.fixture
def damaged(shapes_dataset, tmp_path, monkeypatch):
    """A dataset of which sample 5 has a flipped bit, and no waiting for it to mend."""
    monkeypatch.setattr(loader_module, "RETRY_DELAYS", (0.0,))
    folder = shutil.copytree(shapes_dataset, tmp_path / "set")
    dataset = load_dataset(folder)
    damage(folder, dataset, 5)
    return dataset


def batches(dataset, count, config=CONFIG, **options):
    plan = Plan(dataset, config)
    iterator = iter(PackLoader(dataset, plan, plan.start(), **options))
    taken = list(islice(iterator, count))
    iterator.close()
    return taken


def identity(batch):
    return batch.step, batch.pack, batch.sample_ids, batch.flips, batch.layout.lengths, batch.labels.tolist()


@pytest.fixture(scope="module")
def even_dataset(tmp_path_factory):
    """A dataset whose latents have even sides, of 8 channels."""
    folder = tmp_path_factory.mktemp("even")
    config = EncodeConfig(factor=8, channels=8, patch_size=2, shard_samples=4)
    encode_folder(make_folder(folder / "images"), folder / "latents", config, progress=False)
    return load_dataset(folder / "latents")


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_batch_holds_the_latents_of_its_images_in_order(even_dataset, patch_size):
    dataset = even_dataset
    plan = Plan(dataset, replace(CONFIG, patch_size=patch_size))
    pack = plan.step(plan.start())[0][0]
    batch = read_pack(dataset, pack, patch_size)
    assert batch.tokens.dtype == torch.float16
    assert batch.tokens.shape == (pack.num_tokens, 8 * patch_size**2)
    starts = batch.layout.cu_seqlens.tolist()
    for i, sample_id in enumerate(batch.sample_ids):
        grid = tuple(batch.layout.grids[i].tolist())
        latent = unpatchify(batch.tokens[starts[i] : starts[i + 1]], grid, patch_size)
        assert torch.equal(latent, dataset.latent(sample_id, batch.flips[i]))
        assert batch.labels[i] == dataset.index.label[sample_id]
    assert batch.weights.tolist() == [1.0] * len(batch.sample_ids)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(dataset, workers):
    alone, shared = batches(dataset, 20), batches(dataset, 20, workers=workers)
    assert [identity(b) for b in shared] == [identity(b) for b in alone]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_steps_of_one_rank(dataset, world_size):
    alone = batches(dataset, 12)
    per_rank = 12 // world_size
    ranks = [batches(dataset, per_rank, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = sorted((identity(b) for rank in ranks for b in rank), key=lambda item: item[:2])
    assert together == sorted((identity(b) for b in alone), key=lambda item: item[:2])


def test_reading_begins_at_the_given_state(dataset):
    plan = Plan(dataset, CONFIG)
    state = plan.start()
    for _ in range(3):
        _, state = plan.step(state)
    resumed = list(islice(iter(PackLoader(dataset, plan, state)), 4))
    assert [identity(b) for b in resumed] == [identity(b) for b in batches(dataset, 16)[12:]]


def test_a_wrong_world_size_is_refused_before_anything_is_read(dataset):
    plan = Plan(dataset, CONFIG)
    with pytest.raises(UserError, match="use one of 1, 2, 4 ranks"):
        PackLoader(dataset, plan, plan.start(), world_size=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_keeps_its_place_without_weight_and_is_reported(dataset, damaged, workers):
    for good, bad in zip(batches(dataset, 12), batches(damaged, 12, workers=workers), strict=True):
        assert good.sample_ids == bad.sample_ids
        if 5 not in good.sample_ids:
            assert bad.unreadable == ()
            assert torch.equal(good.tokens, bad.tokens)
            continue
        place = good.sample_ids.index(5)
        ((sample_id, reason),) = bad.unreadable
        assert sample_id == 5
        assert "checksum" in reason
        assert bad.weights.tolist() == [float(i != place) for i in range(len(good.sample_ids))]
        zero = bad.layout.segment_ids == place
        assert not bad.tokens[zero].any()
        assert torch.equal(bad.tokens[~zero], good.tokens[~zero])
    assert any(b.unreadable for b in batches(damaged, 12))


def test_a_sample_that_can_be_read_at_the_second_try_is_no_loss(dataset, monkeypatch):
    monkeypatch.setattr(loader_module, "RETRY_DELAYS", (0.0,))
    read_range, calls = dataset.storage.read_range, []

    def flaky(name, offset, length):
        calls.append(offset)
        if len(calls) % 2:
            raise OSError(5, "Input/output error")
        return read_range(name, offset, length)

    monkeypatch.setattr(dataset.storage, "read_range", flaky)
    assert all(not b.unreadable and b.weights.all() for b in batches(dataset, 4))


def running(loader_iterator):
    """The worker processes that the iterator starts."""
    before = set(psutil.Process().children())
    next(loader_iterator)
    return [p for p in psutil.Process().children() if p not in before and p.status() != psutil.STATUS_ZOMBIE]


def test_workers_leave_the_jobs_signals_to_the_trainer_and_end_with_the_iterator(dataset):
    plan = Plan(dataset, CONFIG)
    iterator = iter(PackLoader(dataset, plan, plan.start(), workers=2))
    workers = running(iterator)
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        # Sent by another process, as a scheduler does; what the trainer itself sends is obeyed.
        os.waitpid(os.posix_spawn("/bin/kill", ["kill", f"-{number}", *[str(w.pid) for w in workers]], {}), 0)
    assert len(list(islice(iterator, 40))) == 40
    assert all(worker.is_running() for worker in workers)
    iterator.close()
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_dies_is_an_error_that_names_it_and_no_hang(dataset, monkeypatch, number):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    plan = Plan(dataset, CONFIG)
    iterator = iter(PackLoader(dataset, plan, plan.start(), workers=2))
    first, second = running(iterator)
    os.kill(first.pid, number)
    with pytest.raises(WorkerDied, match=rf"worker process {first.pid} \(.*\) ended .* run again to continue"):
        list(islice(iterator, 1000))
    iterator.close()
    psutil.wait_procs([second], timeout=10)
    assert not second.is_running()


def test_the_wait_for_data_is_measured(dataset):
    assert all(0 < b.data_wait_s < 60 for b in batches(dataset, 3))


@pytest.fixture(scope="module")
def image_dataset(tmp_path_factory):
    """A dataset with the pixels that were encoded; patches of 16 pixels, latents that keep all but fine detail."""
    folder = tmp_path_factory.mktemp("images")
    config = EncodeConfig(factor=8, channels=96, patch_size=2, shard_samples=4, jpeg=True)
    encode_folder(make_folder(folder / "images", images=6), folder / "latents", config, progress=False)
    return folder / "latents"


def one_pack(dataset, patch_size=2, **options):
    plan = Plan(dataset, replace(CONFIG, patch_size=patch_size))
    return read_pack(dataset, plan.step(plan.start())[0][0], patch_size, **options)


def test_images_are_the_pixels_of_the_latents_mirrored_where_they_are(image_dataset):
    dataset = load_dataset(image_dataset)
    batch = one_pack(dataset, members=("image",))
    assert set(batch.flips) == {True, False}
    starts = batch.layout.cu_seqlens.tolist()
    for i, image in enumerate(batch.images.split()):
        grid = tuple(batch.layout.grids[i].tolist())
        assert image.dtype == torch.uint8 and image.shape == (3, grid[0] * 16, grid[1] * 16)
        latent = unpatchify(batch.tokens[starts[i] : starts[i + 1]].float(), grid, 2)
        decoded = (dataset.codec().decode(latent[None])[0] + 1) * 127.5
        assert (image - decoded).abs().mean() < 4 < (image.flip(2) - decoded).abs().mean()
    assert one_pack(dataset).images is None


def test_workers_hand_over_images(image_dataset):
    dataset = load_dataset(image_dataset)
    options = {"config": replace(CONFIG, patch_size=2), "members": ("image",)}
    alone, shared = batches(dataset, 4, **options), batches(dataset, 4, workers=1, **options)
    assert all(torch.equal(a.images.pixels, b.images.pixels) for a, b in zip(alone, shared, strict=True))
    assert all(a.images.sizes == b.images.sizes for a, b in zip(alone, shared, strict=True))


def test_a_sample_whose_image_is_damaged_is_as_one_whose_latent_is(image_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "RETRY_DELAYS", (0.0,))
    folder = shutil.copytree(image_dataset, tmp_path / "set")
    dataset = load_dataset(folder)
    good = one_pack(dataset, members=("image",))
    place = next(i for i, sample_id in enumerate(good.sample_ids) if good.sample_ids.count(sample_id) == 1)
    damage_member(folder, dataset, "image", good.sample_ids[place])
    bad = one_pack(load_dataset(folder), members=("image",))
    assert [sample_id for sample_id, _ in bad.unreadable] == [good.sample_ids[place]]
    assert "checksum" in bad.unreadable[0][1]
    assert bad.weights.tolist() == [float(i != place) for i in range(len(good.sample_ids))]
    assert not bad.tokens[bad.layout.segment_ids == place].any()
    for i, (before, after) in enumerate(zip(good.images.split(), bad.images.split(), strict=True)):
        assert after.any() == (i != place)
        assert i == place or torch.equal(before, after)
    assert not one_pack(load_dataset(folder)).unreadable  # nobody asked for the images


def test_a_jpeg_that_is_not_of_its_latent_is_refused_before_it_is_decoded():
    picture(32, 48).save(buffer := io.BytesIO(), "JPEG")
    data = buffer.getvalue()
    assert decode_jpeg(data, (32, 48), "name").shape == (32, 48, 3)
    with pytest.raises(UnreadableSample, match="name: 32 x 48 pixels, its latent is of 48 x 32"):
        decode_jpeg(data, (48, 32), "name")
    for broken in (data[: len(data) // 2], b"\xff\xd8", b""):
        with pytest.raises(UnreadableSample, match="name: "):
            decode_jpeg(broken, (32, 48), "name")


def test_members_that_a_dataset_lacks_are_refused_with_the_way_to_get_them(dataset):
    plan = Plan(dataset, CONFIG)
    with pytest.raises(UserError, match=r"have no image; encode it again with `nitscale encode --jpeg`"):
        PackLoader(dataset, plan, plan.start(), members=("image",))
    with pytest.raises(UserError, match=r"have no features; add KEY\.features\.npy"):
        PackLoader(dataset, plan, plan.start(), members=("features",))


FEATURES = 5
"""Of one token."""


def write_features(folder, tokens=lambda grid: grid[0] * grid[1]):
    """A dataset of eight samples in two tars, with features that say which sample, token, variant and feature it is."""
    folder.mkdir()
    for shard in range(2):
        with open(folder / f"{shard}.tar", "wb") as file, ShardWriter(file) as writer:
            for i in range(4 * shard, 4 * shard + 4):
                grid = (2 + 2 * (i % 2), 4)
                latents = torch.full((2, 4, *grid), float(i), dtype=torch.float16)
                number = np.arange(2 * tokens(grid) * FEATURES).reshape(2, tokens(grid), FEATURES)
                features = torch.from_numpy(number + 1000.0 * i).half()
                writer.add(f"{i:03d}", latents, {"label": 0}, features=features)
    codec = {"id": "external", "factor": 8, "channels": 4, "digest": ""}
    index_dataset(folder, codec, workers=1, progress=False)
    return load_dataset(folder)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_features_come_with_their_tokens_in_the_variant_of_the_latent(tmp_path, patch_size):
    dataset = write_features(tmp_path / "set", lambda grid: grid[0] * grid[1] // patch_size**2)
    assert dataset.manifest.members == ["features"]
    assert "is whole" in verify_dataset(tmp_path / "set", progress=False)
    assert feature_width(dataset, patch_size) == FEATURES
    batch = one_pack(dataset, patch_size, members=("features",))
    assert set(batch.flips) == {True, False}
    assert batch.features.dtype == torch.float16
    expected = []
    for i, flipped, length in zip(batch.sample_ids, batch.flips, batch.layout.lengths, strict=True):
        number = torch.arange(length * FEATURES).view(length, FEATURES) + flipped * length * FEATURES
        expected.append((number + 1000.0 * i).half())
    assert torch.equal(batch.features, torch.cat(expected))


def test_features_of_another_number_of_tokens_are_refused(tmp_path):
    dataset = write_features(tmp_path / "set", tokens=lambda grid: 8)
    plan = Plan(dataset, replace(CONFIG, lanes=1))
    with pytest.raises(UserError, match=r"have 2\.5, 5 numbers a token; .* every token of patch size 1"):
        PackLoader(dataset, plan, plan.start(), members=("features",))


def test_damage_to_the_features_of_one_variant_is_none_to_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "RETRY_DELAYS", ())
    dataset = write_features(tmp_path / "set")
    good = one_pack(dataset, 1, members=("features",))
    damage_member(tmp_path / "set", dataset, "features", good.sample_ids[0], flipped=not good.flips[0])
    damage_member(tmp_path / "set", dataset, "features", good.sample_ids[1], flipped=good.flips[1])
    bad = one_pack(load_dataset(tmp_path / "set"), 1, members=("features",))
    assert [sample_id for sample_id, _ in bad.unreadable] == [good.sample_ids[1]]
    hurt = bad.layout.segment_ids == 1
    assert not bad.features[hurt].any()
    assert torch.equal(bad.features[~hurt], good.features[~hurt])
