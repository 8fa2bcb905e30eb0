import pickle
from pathlib import Path

import pytest

from nitscale.data import storage as storage_module
from nitscale.data.storage import open_storage
from nitscale.errors import UserError


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "set")


def test_what_was_written_is_read_whole_and_by_range(storage):
    storage.write("shards/a.tar", bytes(range(100)))
    assert storage.read("shards/a.tar") == bytes(range(100))
    assert storage.read_range("shards/a.tar", 10, 5) == bytes(range(10, 15))
    assert storage.size("shards/a.tar") == 100
    assert storage.exists("shards/a.tar")
    assert not storage.exists("shards/b.tar")


@pytest.mark.parametrize(("offset", "length"), [(95, 6), (100, 1), (500, 10)])
def test_a_range_beyond_the_end_is_an_error_and_not_a_short_read(storage, offset, length):
    storage.write("a", bytes(100))
    with pytest.raises(OSError, match="truncated"):
        storage.read_range("a", offset, length)


def test_only_finished_objects_are_listed(storage):
    storage.write("shards/b", b"")
    storage.write("shards/a", b"")
    with storage.create("shards/c") as path:
        path.write_bytes(b"half")
        assert storage.list("shards") == ["shards/a", "shards/b"]
    assert storage.list("shards") == ["shards/a", "shards/b", "shards/c"]
    assert storage.list("nothing") == []


def test_leftovers_of_a_killed_writer_go_when_the_next_one_begins(storage, tmp_path):
    leftover = tmp_path / "set" / "shards" / ".000000.tar.123.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    with storage.exclusive("encoding into"):
        assert not leftover.exists()


def test_two_writers_of_one_prefix_are_refused(storage):
    with (
        storage.exclusive("encoding into"),
        pytest.raises(UserError, match=r"already encoding into .*set"),
        storage.exclusive("encoding into"),
    ):
        pass


@pytest.mark.parametrize("name", ["../outside", "shards/../../outside", "/etc/passwd"])
def test_a_name_that_leads_out_of_the_prefix_is_refused(storage, name):
    with pytest.raises(UserError, match="leads out of the dataset"):
        storage.read(name)


@pytest.mark.parametrize("prefix", ["s3://bucket/set", Path("s3://bucket/set"), "gs://bucket"])
def test_object_stores_are_refused_with_the_way_out(prefix):
    with pytest.raises(UserError, match=r"local folders only, got '.*bucket.*'; copy"):
        open_storage(prefix)


def test_few_files_stay_open_and_reading_goes_on(storage, monkeypatch):
    monkeypatch.setattr(storage_module, "OPEN_FILES", 2)
    for i in range(5):
        storage.write(f"{i}", bytes([i]))
    assert [storage.read_range(f"{i % 5}", 0, 1)[0] for i in range(10)] == [0, 1, 2, 3, 4] * 2
    assert len(storage._open_files) == 2


def test_a_storage_goes_to_another_process_without_its_open_files(storage):
    storage.write("a", b"abc")
    storage.read_range("a", 0, 1)
    assert pickle.loads(pickle.dumps(storage)).read_range("a", 1, 2) == b"bc"
