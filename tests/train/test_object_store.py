"""Training from an object store: through a shard cache, over real HTTP with faults, the same run as from a folder."""

import pytest
import torch

from nitscale.data.loader import PackLoader
from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Plan, PlanConfig
from nitscale.data.storage import open_storage
from nitscale.train.loop import run_training
from nitscale.train.process import start_process
from tests.data.faults import flip_bit, s3_behind_faults
from tests.train.tiny import differences, final_state, metrics, tiny_run

PREFIX = "s3://bucket/shapes"


@pytest.fixture(scope="module")
def server():
    with s3_behind_faults() as proxy:
        yield proxy


@pytest.fixture
def proxy(server, shapes_dataset):
    """The store with the data set in it, as it was encoded."""
    store = open_storage(PREFIX)
    for path in sorted(shapes_dataset.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            store.write(path.relative_to(shapes_dataset).as_posix(), path.read_bytes())
    server.clear()
    yield server
    server.clear()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_from_an_object_store_with_faults_is_the_run_from_a_folder(proxy, trained_run, tmp_path, workers):
    proxy.add(3, containing="shapes/shards", status=503)
    proxy.add(containing="shapes/shards", cut_body=5000)
    proxy.add(containing="shapes/index", cut_body=100)
    proxy.add(containing="shapes/shards", change=flip_bit(9000))
    run = tiny_run(tmp_path / "run", PREFIX, f"data.workers={workers}", f"data.cache={tmp_path / 'cache'}")
    assert run_training(run, start_process())
    assert proxy.pending() == 0
    same = [(line["data_digest"], line["loss"]) for line in metrics(trained_run)]
    assert [(line["data_digest"], line["loss"]) for line in metrics(tmp_path / "run")] == same
    assert differences(
        {k: v for k, v in final_state(trained_run).items() if k != "state.json"},
        {k: v for k, v in final_state(tmp_path / "run").items() if k != "state.json"},
    ) == []  # fmt: skip
    assert not any(line["unreadable"] for line in metrics(tmp_path / "run"))


def test_a_cache_that_holds_half_of_the_shards_is_enough(proxy, shapes_dataset, tmp_path):
    config = PlanConfig(seed=5, token_budget=48, packs_per_step=8, lanes=2, block_samples=16)
    here, there = load_dataset(shapes_dataset), load_dataset(PREFIX)
    largest = max(shard["bytes"] for shard in there.manifest.shards)
    cached = there.cached(tmp_path / "cache", 2 * largest)
    plans = [Plan(dataset, config) for dataset in (here, cached)]
    loaders = [PackLoader(dataset, plan, plan.start()) for dataset, plan in zip((here, cached), plans, strict=True)]
    for _, expected, found in zip(range(8 * 12), *loaders, strict=False):
        assert found.sample_ids == expected.sample_ids
        assert torch.equal(found.tokens, expected.tokens)
        assert found.weights.all()
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    assert sum(path.stat().st_size for path in kept) <= 2 * largest
    assert len(proxy.requests("GET", "shapes/shards")) > 4
