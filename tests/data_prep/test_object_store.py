"""Encoding from an object store into one, over real HTTP with faults: nothing is lost, doubled or wrong."""

import multiprocessing

import pytest

from data_prep.encode import encode
from data_prep.pipeline import EncodeConfig
from nitscale.data.manifest import load_dataset, read_manifest
from nitscale.data.storage import open_storage
from nitscale.data.verify import verify_dataset
from tests.data.faults import client, s3_behind_faults
from tests.data_prep.pictures import make_folder

CONFIG = EncodeConfig(shard_samples=3)


@pytest.fixture(scope="module")
def server():
    with s3_behind_faults() as proxy:
        yield proxy


@pytest.fixture
def proxy(server):
    yield server
    server.clear()


@pytest.fixture(scope="module")
def images(server, tmp_path_factory):
    """A folder of eight images, which is also in the store."""
    folder = make_folder(tmp_path_factory.mktemp("images") / "images")
    store = open_storage("s3://bucket/images")
    for path in folder.rglob("*.*"):
        store.write(path.relative_to(folder).as_posix(), path.read_bytes())
    server.clear()
    return folder


@pytest.fixture(scope="module")
def reference(images, tmp_path_factory):
    """The version of the dataset that these images give in a folder."""
    return encode(images, tmp_path_factory.mktemp("reference") / "set", CONFIG).digest


def whole(prefix, reference):
    """Whether the dataset is the reference, and its prefix holds nothing else."""
    manifest = read_manifest(open_storage(prefix))
    uploads = client().list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    assert manifest.digest == reference
    assert not uploads
    words = verify_dataset(prefix, progress=False)
    return "is whole" in words and "does not name" not in words


def test_faults_on_the_way_change_nothing(proxy, images, reference):
    proxy.add(6, status=503)
    proxy.add(2, method="GET", containing="/images/", cut_body=50)
    proxy.add(method="PUT", containing="shards", cut_request=1000)
    proxy.add(2, method="PUT", containing="shards", lose_reply=True)
    proxy.add(3, method="PUT", containing="commits", lose_reply=True)
    proxy.add(method="PUT", containing="encode.json", lose_reply=True)
    proxy.add(method="PUT", containing="manifest.json", lose_reply=True)
    report = encode("s3://bucket/images", "s3://bucket/faults", CONFIG)
    assert proxy.pending() == 0
    assert (report.samples, len(report.failures)) == (8, 0)
    assert whole("s3://bucket/faults", reference)


def test_a_rerun_makes_what_is_missing_in_the_store(proxy, images, reference):
    encode("s3://bucket/images", "s3://bucket/again", CONFIG)
    store = open_storage("s3://bucket/again")
    store.delete(min(store.list("shards")))
    store.delete("manifest.json")
    proxy.clear()
    encode("s3://bucket/images", "s3://bucket/again", CONFIG)
    assert len(proxy.requests("PUT", "again/shards")) == 1
    assert whole("s3://bucket/again", reference)


def job(barrier):
    barrier.wait(120)
    encode("s3://bucket/images", "s3://bucket/race", CONFIG)


def test_sixteen_processes_that_make_the_same_partitions_at_once_make_each_once(proxy, images, reference):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(16)
    jobs = [fork.Process(target=job, args=(barrier,)) for _ in range(16)]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join(200)
    assert [process.exitcode for process in jobs] == [0] * 16
    assert whole("s3://bucket/race", reference)
    assert load_dataset("s3://bucket/race").index.num_samples == 8
    assert len(open_storage("s3://bucket/race").list("commits")) == 3
