import os
import shutil
import signal
from dataclasses import replace
from itertools import islice

import psutil
import pytest
import torch

from data_prep.encode import encode_folder
from data_prep.pipeline import EncodeConfig
from nitscale.data import loader as loader_module
from nitscale.data.loader import PackLoader, WorkerDied, read_pack
from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Plan, PlanConfig
from nitscale.errors import UserError
from nitscale.layout import unpatchify
from tests.data.damage import damage
from tests.data_prep.pictures import make_folder

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
