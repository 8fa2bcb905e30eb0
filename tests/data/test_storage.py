import errno
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale import files
from nitscale.data import folder as folder_module
from nitscale.data.storage import RangedFile, open_object, open_storage
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


def test_only_finished_objects_are_listed_with_their_sizes(storage):
    storage.write("shards/b", b"")
    storage.write("shards/a", b"1234")
    with storage.create("shards/c") as path:
        path.write_bytes(b"half")
        assert storage.list("shards") == {"shards/a": 4, "shards/b": 0}
    assert list(storage.list("shards").items()) == [("shards/a", 4), ("shards/b", 0), ("shards/c", 4)]
    assert storage.list("nothing") == {}


def test_a_list_is_of_one_folder_or_of_all_below(storage, tmp_path):
    for name in ("top", "a/one", "a/b/two", "a/.hidden", ".git/x"):
        storage.write(name, b"1")
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "dangling").symlink_to("nowhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "three").write_bytes(b"123")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert storage.list("") == {"top": 1}
    assert storage.list("a") == {"a/one": 1}
    assert storage.list("a/b", recursive=True) == {"a/b/two": 1}
    assert storage.list("", recursive=True) == {"a/b/two": 1, "a/one": 1, "linked/three": 3, "top": 1}


def test_an_object_that_is_there_is_not_put_again(storage):
    assert storage.put_if_absent("commits/a", b"mine")
    assert not storage.put_if_absent("commits/a", b"yours")
    assert storage.read("commits/a") == b"mine"
    assert storage.list("commits") == {"commits/a": 4}


def test_deleting_twice_is_no_error(storage):
    storage.write("a", b"")
    storage.delete("a")
    storage.delete("a")
    assert not storage.exists("a")


def test_a_download_is_whole_and_checked(storage, tmp_path):
    storage.write("a", b"abc" * 1000)
    target = tmp_path / "there" / "a"
    storage.download("a", target, 3000, hashlib.sha256(b"abc" * 1000).hexdigest())
    assert target.read_bytes() == b"abc" * 1000
    for size, sha256, reason in [
        (2999, None, "3,000 bytes instead of 2,999"),
        (3000, 64 * "0", "is damaged: its sha256"),
    ]:
        with pytest.raises(OSError, match=reason):
            storage.download("a", tmp_path / "here" / "a", size, sha256)
        assert list((tmp_path / "here").iterdir()) == []
    with pytest.raises(FileNotFoundError):
        storage.download("b", target, 3000)


def test_what_is_replaced_is_read_anew(storage):
    storage.write("a", b"old")
    assert storage.read_range("a", 0, 3) == b"old"
    storage.write("a", b"new")
    assert storage.read_range("a", 0, 3) == b"new"


def test_what_another_process_replaced_is_read_anew_after_forgetting(storage, tmp_path):
    storage.write("a", b"old")
    storage.read_range("a", 0, 3)
    files.atomic_write(tmp_path / "set" / "a", b"new")
    assert storage.read_range("a", 0, 3) == b"old"
    storage.forget("a")
    assert storage.read_range("a", 0, 3) == b"new"


def test_leftovers_of_a_killed_writer_go_when_the_next_one_begins(storage, tmp_path):
    pid = os.fork()
    if pid == 0:
        with storage.create("shards/000000.tar") as path:
            path.write_bytes(b"half")
            os._exit(0)
    os.waitpid(pid, 0)
    assert len(list((tmp_path / "set" / "shards").iterdir())) == 1
    with storage.exclusive("encoding into"):
        assert list((tmp_path / "set" / "shards").iterdir()) == []


def test_two_writers_of_one_prefix_are_refused(storage):
    with (
        storage.exclusive("encoding into"),
        pytest.raises(UserError, match=r"already encoding into .*set"),
        storage.exclusive("encoding into"),
    ):
        pass


@pytest.mark.parametrize("name", ["../outside", "shards/../../outside", "/etc/passwd", "..", "a//b", "", "./a", "a\0b"])
@pytest.mark.parametrize("prefix", ["set", "s3://bucket/set"])
def test_a_name_that_leads_out_of_the_prefix_is_refused(tmp_path, monkeypatch, prefix, name):
    monkeypatch.chdir(tmp_path)
    storage = open_storage(prefix)
    for act in (
        storage.read,
        storage.size,
        storage.delete,
        lambda name: storage.read_range(name, 0, 1),
        lambda name: storage.write(name, b""),
        lambda name: storage.put_if_absent(name, b""),
        lambda name: storage.download(name, Path("x"), 1),
        lambda name: storage.create(name).__enter__(),
    ):
        with pytest.raises(UserError, match=r"leads out of .*set|is no name of an object in .*set"):
            act(name)


def test_other_object_stores_are_refused_with_the_way_out():
    for prefix in ("gs://bucket/set", Path("gs://bucket/set")):
        with pytest.raises(UserError, match=r"'gs:/.*neither a folder nor s3://.*AWS_ENDPOINT_URL"):
            open_storage(prefix)
    with pytest.raises(UserError, match="names no bucket"):
        open_storage("s3://")


@pytest.mark.parametrize(
    ("uri", "prefix", "name"),
    [
        ("a.tar", ".", "a.tar"),
        ("/a.tar", "/", "a.tar"),
        ("x/y/a.tar", "x/y", "a.tar"),
        (Path("/x/a b.tar"), "/x", "a b.tar"),
        ("s3://bucket/a.tar", "s3://bucket", "a.tar"),
        ("s3://bucket/x/y/a.tar", "s3://bucket/x/y", "a.tar"),
        (Path("s3://bucket/x/a.tar"), "s3://bucket/x", "a.tar"),
    ],
)
def test_an_object_is_named_by_its_storage_and_its_name(uri, prefix, name):
    storage, found = open_object(uri)
    assert (storage.prefix, found) == (prefix, name)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://", "s3://bucket/x/", "x/", "", "x/.."])
def test_a_uri_that_names_no_object_is_refused(uri):
    with pytest.raises(UserError, match="names no object"):
        open_object(uri)


def test_few_files_stay_open_and_reading_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "OPEN_FILES", 2)
    storage = open_storage(tmp_path)
    for i in range(5):
        storage.write(f"{i}", bytes([i]))
    before = len(os.listdir("/proc/self/fd"))
    assert [storage.read_range(f"{i % 5}", 0, 1)[0] for i in range(10)] == [0, 1, 2, 3, 4] * 2
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_a_storage_goes_to_another_process_without_its_open_files(storage):
    storage.write("a", b"abc")
    storage.read_range("a", 0, 1)
    assert pickle.loads(pickle.dumps(storage)).read_range("a", 1, 2) == b"bc"


def test_a_full_disk_is_named_and_leaves_no_half_object(storage, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fsync", full)
    for write in (storage.write, storage.put_if_absent):
        with pytest.raises(UserError, match=r"disk is full: cannot write .*set/a"):
            write("a", b"x")
    assert list((tmp_path / "set").iterdir()) == []


@given(st.binary(max_size=200), st.integers(1, 50), st.lists(st.tuples(st.integers(0, 250), st.integers(-1, 250))))
@settings(deadline=None)
def test_an_object_as_a_file_reads_like_a_file(tmp_path_factory, data, buffer_bytes, reads):
    storage = open_storage(tmp_path_factory.mktemp("ranged"))
    storage.write("a", data)
    file, reference = RangedFile(storage, "a", buffer_bytes), io.BytesIO(data)
    for position, length in reads:
        assert file.seek(position) == reference.seek(position)
        assert file.read(length) == reference.read(length)
        assert file.tell() == reference.tell()


def test_an_object_as_a_file_is_read_by_tarfile(storage):
    with storage.create("a.tar") as path, tarfile.open(path, "w") as tar:
        for name in ("one", "two"):
            info = tarfile.TarInfo(name)
            info.size = 1000
            tar.addfile(info, io.BytesIO(name.encode() * 1000))
    with tarfile.open(fileobj=RangedFile(storage, "a.tar", 700)) as tar:
        assert [member.name for member in tar] == ["one", "two"]
        assert tar.extractfile("two").read() == (b"two" * 1000)[:1000]
    with pytest.raises(ValueError, match="negative"):
        RangedFile(storage, "a.tar").seek(-1)
