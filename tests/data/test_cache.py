import errno
import fcntl
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale.data import cache as cache_module
from nitscale.data import s3
from nitscale.data.cache import CachedStorage
from nitscale.data.shelf import Shelf, shelf_of
from nitscale.data.storage import open_storage
from nitscale.errors import UserError
from tests.data.faults import flip_bit, notice_stalls, s3_behind_faults

fork = multiprocessing.get_context("fork")
SIZE = 10_000


@pytest.fixture(scope="module")
def server():
    with s3_behind_faults() as proxy:
        yield proxy


@pytest.fixture
def proxy(server):
    yield server
    server.clear()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(cache_module, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(cache_module, "POLL_SECONDS", 0.002)
    monkeypatch.setattr(cache_module, "FULL_SECONDS", 0.2)


def content(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest() * (SIZE // 32) + bytes(SIZE % 32)


def filled(prefix, names: str) -> tuple:
    """A storage with a shard for each letter, and what a manifest says of them."""
    storage = open_storage(prefix)
    for name in names:
        storage.write(f"shards/{name}", content(name))
    return storage, {f"shards/{n}": (SIZE, hashlib.sha256(content(n)).hexdigest()) for n in names}


@pytest.fixture
def make(tmp_path):
    """Makes caches for the same local "remote" of shards a … f: they hold `shards` of them."""
    remote, table = filled(tmp_path / "remote", "abcdef")
    return lambda shards=3: CachedStorage(remote, tmp_path / "cache", int(shards * SIZE), table)


@pytest.fixture
def distant(proxy, request, tmp_path):
    """A cache of an S3 prefix with shards a, b and c."""
    remote, table = filled(f"s3://bucket/{abs(hash(request.node.name))}", "abc")
    proxy.clear()
    return CachedStorage(remote, tmp_path / "cache", 3 * SIZE, table)


def read(storage, name: str) -> bool:
    """Reads a shard; whether it is right."""
    return storage.read_range(f"shards/{name}", 100, 5000) == content(name)[100:5100]


def cached(storage) -> str:
    """The letters of the shards in the cache."""
    return "".join(sorted(n[-1] for n, s in storage._shards.items() if (storage._folder / s.entry).exists()))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def in_another_process(act):
    """What `act()` gives in a forked process."""
    results = fork.SimpleQueue()
    process = fork.Process(target=lambda: results.put(act()))
    process.start()
    result = results.get()
    process.join()
    return result


@pytest.fixture
def living():
    """Begins processes that do something, then live on until the test ends."""
    processes = []

    def begin(act):
        done = fork.Event()

        def run():
            act()
            done.set()
            signal.pause()

        processes.append(fork.Process(target=run))
        processes[-1].start()
        assert done.wait(20)
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.join()


# Reading


def test_a_shard_is_fetched_once_and_everything_else_from_the_remote(distant, proxy):
    assert [read(distant, name) for name in "aabab"] == [True] * 5
    assert len(proxy.requests("GET")) == 2
    distant.write("index/a.npz", b"index")
    assert distant.read("index/a.npz") == distant.read_range("index/a.npz", 0, 5) == b"index"
    assert distant.put_if_absent("commits/a", b"1") and not distant.put_if_absent("commits/a", b"2")
    with distant.create("big") as path:
        path.write_bytes(b"big")
    assert distant.list("", recursive=True).keys() == {"big", "commits/a", "index/a.npz", *distant._shards}
    assert distant.exists("big") and distant.size("big") == 3
    distant.delete("big")
    assert not distant.exists("big")
    with distant.exclusive("encoding into"):
        pass


def test_a_range_beyond_the_end_is_an_error(make):
    with pytest.raises(OSError, match="truncated"):
        make().read_range("shards/a", SIZE - 1, 2)


def test_equal_names_of_two_prefixes_and_of_two_contents_do_not_collide(make, tmp_path):
    assert read(make(), "a")
    other = open_storage(tmp_path / "other")
    for data in (b"1" * SIZE, b"2" * SIZE):
        other.write("shards/a", data)
        table = {"shards/a": (SIZE, hashlib.sha256(data).hexdigest())}
        assert CachedStorage(other, tmp_path / "cache", 3 * SIZE, table).read_range("shards/a", 0, SIZE) == data
    assert len(list((tmp_path / "cache").glob("?" * 32))) == 3


def test_a_limit_below_one_shard_is_refused(make):
    with pytest.raises(UserError, match=r"limit of 9,000 bytes is less than the 10,000 of .*remote/shards/a; raise it"):
        make(0.9)


def test_a_file_of_the_wrong_size_is_fetched_again(make):
    storage = make()
    (storage._folder / storage._shards["shards/a"].entry).write_bytes(b"half")
    assert read(storage, "a")


def test_a_shard_that_does_not_match_its_hash_never_gets_into_the_cache(make, tmp_path):
    open_storage(tmp_path / "remote").write("shards/a", content("x"))
    storage = make()
    with pytest.raises(OSError, match=r"shards/a is damaged: its sha256"):
        read(storage, "a")
    assert cached(storage) == ""


def test_bytes_corrupted_on_the_way_never_get_into_the_cache(distant, proxy):
    proxy.add(method="GET", change=flip_bit(4000))
    assert read(distant, "a")
    assert len(proxy.requests("GET")) == 2


def test_a_cached_shard_that_turns_out_wrong_is_fetched_again(distant, proxy):
    assert read(distant, "a")
    path = distant._folder / distant._shards["shards/a"].entry
    with open(path, "r+b") as file:
        file.seek(200)
        file.write(b"rot")
    assert not read(distant, "a")
    distant.forget("shards/a")
    assert read(distant, "a")
    assert len(proxy.requests("GET")) == 2


def test_a_cached_shard_that_is_right_is_neither_fetched_nor_hashed_again(distant, proxy, monkeypatch):
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: hashed.append(1) or digest(*arguments))
    for _ in range(5):
        assert read(distant, "a")
        distant.forget("shards/a")
    assert len(proxy.requests("GET")) == 1
    assert len(hashed) == 1
    distant.forget("index/a.npz")
    distant.forget("shards/b")


def test_a_cache_goes_to_a_spawned_process(make):
    storage = make()
    assert read(storage, "a")
    other = pickle.loads(pickle.dumps(storage))
    assert read(other, "a") and other.prefix == storage.prefix
    assert "remote" in repr(other)


# Several processes


def test_processes_that_need_one_shard_fetch_it_once(distant, proxy):
    start, results = fork.Event(), fork.SimpleQueue()

    def run():
        start.wait(20)
        results.put(read(distant, "a") and read(distant, "b"))

    processes = [fork.Process(target=run) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    assert [results.get() for _ in processes] == [True] * 8
    for process in processes:
        process.join()
    assert sorted(path[-1] for path in proxy.requests("GET")) == ["a", "b"]


def test_threads_that_need_one_shard_fetch_it_once(distant, proxy):
    results = []
    threads = [threading.Thread(target=lambda: results.append(read(distant, "a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert len(proxy.requests("GET")) == 1


def test_when_a_downloader_is_killed_another_goes_on_from_where_it_stopped(distant, proxy, monkeypatch):
    monkeypatch.setattr(s3, "RECEIVE_BYTES", 256)
    proxy.add(method="GET", stall_after=9500)
    downloader = fork.Process(target=read, args=(distant, "a"))
    downloader.start()
    (partial,) = wait_for(lambda: [path for path in distant._folder.glob(".*.tmp") if path.stat().st_size > 0])
    results = fork.SimpleQueue()
    waiting = fork.Process(target=lambda: results.put(read(distant, "a")))
    waiting.start()
    os.kill(downloader.pid, signal.SIGKILL)
    kept = partial.stat().st_size
    assert results.get()
    for process in (downloader, waiting):
        process.join()
    ranges = [headers.get("Range") for method, _, headers, _ in proxy.log if method == "GET"]
    assert ranges == [None, f"bytes={kept}-{SIZE - 1}"]
    assert not list(distant._folder.glob(".*"))


def test_what_a_killed_downloader_left_is_removed_when_room_is_needed(distant, proxy):
    proxy.add(method="GET", stall_after=9500)
    downloader = fork.Process(target=read, args=(distant, "a"))
    downloader.start()
    wait_for(lambda: proxy.requests("GET"))
    (partial,) = distant._folder.glob(".*.tmp")
    downloader.kill()
    downloader.join()
    partial.write_bytes(bytes(2 * SIZE))
    assert read(distant, "b") and read(distant, "c")
    assert not partial.exists()
    assert cached(distant) == "bc"


def test_a_process_forked_while_another_thread_fetches_can_read(distant, proxy, monkeypatch):
    notice_stalls(monkeypatch)
    proxy.add(method="GET", stall_after=0)
    distant.expect(["shards/a", "shards/b", "shards/c"])
    wait_for(lambda: proxy.requests("GET"))
    held, over = threading.Event(), threading.Event()

    def hold():  # as the thread may at the moment of the fork
        with shelf_of(distant._folder)._mutex:
            held.set()
            over.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        assert in_another_process(lambda: read(distant, "c") and read(distant, "a"))
    finally:
        over.set()
        holder.join()


def test_a_process_that_fetches_ahead_can_end_at_once(distant, proxy):
    code = f"""
from nitscale.data.cache import *
from nitscale.data.storage import open_storage
table = {distant.__reduce__()[1][3]!r}
storage = CachedStorage(open_storage({distant.prefix!r}), {str(distant._folder)!r}, {3 * SIZE}, table)
storage.expect(list(table))
input()
"""
    proxy.add(method="GET", stall_after=0)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: proxy.requests("GET"))
    began = time.monotonic()
    _, errors = process.communicate(b"\n")
    assert (process.returncode, errors) == (0, b"")
    assert time.monotonic() - began < 5


def test_a_file_that_another_process_has_just_put_right_stays(make, monkeypatch):
    storage = make()
    read(storage, "a")
    path = storage._folder / storage._shards["shards/a"].entry
    path.write_bytes(bytes(SIZE))
    digest = hashlib.file_digest

    def replace_meanwhile(*arguments):
        found = digest(*arguments)
        path.with_name("new").write_bytes(content("a"))
        os.replace(path.with_name("new"), path)
        return found

    monkeypatch.setattr(hashlib, "file_digest", replace_meanwhile)
    storage.forget("shards/a")
    assert path.read_bytes() == content("a")


# Room


def test_what_nobody_expects_goes_first_and_the_longest_unused_of_it(make):
    storage = make()
    for name in "abcab":
        read(storage, name)
    for age, name in enumerate("acb"):
        os.utime(storage._folder / storage._shards[f"shards/{name}"].entry, (age, age))
    assert read(make(), "a")  # opens it
    assert read(storage, "d")
    assert cached(storage) == "abd"
    assert read(storage, "e")
    assert cached(storage) == "ade"


def test_what_is_needed_latest_goes_next(make):
    storage = make()
    for name in "abc":
        read(storage, name)
    shelf_of(storage._folder).want(1, [storage._shards[f"shards/{name}"].entry for name in "dbac"])
    assert read(storage, "d")
    assert cached(storage) == "abd"
    assert read(storage, "e")
    assert cached(storage) == "bde"


def test_what_another_process_expects_sooner_stays(make, living):
    storage = make()
    for name in "abc":
        read(storage, name)
    living(lambda: shelf_of(storage._folder).want(1, [storage._shards[f"shards/{n}"].entry for n in "ba"]))
    living(lambda: shelf_of(storage._folder).want(1, [storage._shards[f"shards/{n}"].entry for n in "ca"]))
    assert read(storage, "d")
    assert cached(storage) == "bcd"


def test_what_dead_processes_expected_does_not_count(make, living):
    storage = make()
    for name in "abc":
        read(storage, name)
    process = living(lambda: shelf_of(storage._folder).want(1, [storage._shards[f"shards/{n}"].entry for n in "a"]))
    for age, name in enumerate("abc"):
        os.utime(storage._folder / storage._shards[f"shards/{name}"].entry, (age, age))
    assert len(list(storage._folder.glob("process-*"))) == 1
    process.kill()
    process.join()
    for suffix in ("json", "new"):
        (storage._folder / f"process-00000000000000f.{suffix}").write_text("no json")
    assert read(storage, "d")
    assert cached(storage) == "bcd"
    assert not list(storage._folder.glob("process-*"))


def test_a_shard_that_is_removed_can_be_read_to_the_end_by_who_has_it_open(make):
    storage, other = make(1), make(1)
    assert read(storage, "a")
    assert read(other, "b")
    assert cached(storage) == "b"
    assert read(storage, "a")  # from the open file
    assert cached(storage) == "b"


def test_the_disk_of_removed_shards_is_let_go_of(make):
    storage = make(1)
    before = len(os.listdir("/proc/self/fd"))
    for name in "abcdef":
        assert read(storage, name)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_who_needs_a_shard_waits_for_room_while_all_is_being_filled(make):
    storage = make(2)
    shelf = shelf_of(storage._folder)
    entries = [storage._shards[f"shards/{name}"].entry for name in "ab"]
    for entry in entries:
        assert shelf.begin(entry) and shelf.make_room(entry, SIZE, 2 * SIZE, None)
    done = []
    thread = threading.Thread(target=lambda: done.append(read(storage, "c")))
    thread.start()
    thread.join(0.1)
    assert not done and cached(storage) == ""
    shelf.end(entries[0])
    thread.join()
    assert done == [True]
    shelf.end(entries[1])


def test_what_another_process_is_fetching_counts_until_it_is_killed(make, living):
    folder, entries = make()._folder, [digit * 32 for digit in "abc"]
    process = living(
        lambda: shelf_of(folder).begin(entries[0]) and shelf_of(folder).make_room(entries[0], 80, 100, None)
    )
    shelf = shelf_of(folder)
    assert not shelf.begin(entries[0])
    assert shelf.begin(entries[1])
    assert not shelf.make_room(entries[1], 30, 100, None)
    assert shelf.make_room(entries[1], 20, 100, None)
    process.kill()
    process.join()
    assert shelf.begin(entries[2])
    assert shelf.make_room(entries[2], 80, 100, None)
    for entry in entries[1:]:
        shelf.end(entry)


def test_what_another_process_is_downloading_is_no_leftover(make, living):
    folder, entries = make()._folder, [digit * 32 for digit in "ab"]
    process = living(lambda: shelf_of(folder).begin(entries[0]))  # its disk was too full to tell the rest
    partial = folder / f".{entries[0]}.0123456789abcdef.tmp"
    partial.write_bytes(bytes(80))
    shelf = shelf_of(folder)
    assert shelf.begin(entries[1])
    shelf.make_room(entries[1], 100, 100, None)
    assert partial.exists()
    process.kill()
    process.join()
    assert shelf.make_room(entries[1], 100, 100, None)
    assert not partial.exists()
    shelf.end(entries[1])


def test_a_shard_that_is_removed_as_soon_as_it_was_fetched_is_not_fetched_again(make, monkeypatch):
    storage = make()
    shelf = shelf_of(storage._folder)
    end, ended = shelf.end, []

    def end_and_remove(entry):
        end(entry)
        ended.append(entry)
        (storage._folder / entry).unlink(missing_ok=True)  # as another process may to make room

    monkeypatch.setattr(shelf, "end", end_and_remove)
    assert read(storage, "a")
    assert len(ended) == 1


def test_a_working_set_that_does_not_fit_is_told(make):
    storage = make(1)
    read(storage, "a")
    shelf_of(storage._folder).want(7, [storage._shards[f"shards/{name}"].entry for name in "ab"])
    with pytest.warns(UserWarning, match=r"does not fit into the cache .*cache; raise its limit"):
        assert read(storage, "b")


@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    wanted=st.lists(st.lists(st.integers(0, 7), max_size=5), max_size=3),
    size=st.integers(1, 150),
    ahead=st.none() | st.integers(0, 5),
)
@settings(deadline=None)
def test_room_is_made_by_removing_the_least_needed_and_no_more(tmp_path_factory, sizes, wanted, size, ahead):
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    entries = [f"{number:032x}" for number in range(8)]
    for number, (entry, length) in enumerate(zip(entries, sizes, strict=False)):
        (shelf._folder / entry).write_bytes(bytes(length))
        os.utime(shelf._folder / entry, (number, number))
    for owner, positions in enumerate(wanted):
        shelf.want(owner, [entries[position] for position in positions])
    need = [min((w.index(n) for w in wanted if n in w), default=99) for n in range(len(sizes))]
    order = sorted(range(len(sizes)), key=lambda n: (-need[n], n))
    limit, going = sum(sizes), []
    while sum(sizes) - sum(sizes[n] for n in going) + size > limit and len(going) < len(sizes):
        going.append(order[len(going)])
    fits = sum(sizes) - sum(sizes[n] for n in going) + size <= limit
    allowed = fits and (ahead is None or all(need[n] > ahead for n in going))
    assert shelf.begin("f" * 32)
    assert shelf.make_room("f" * 32, size, limit, ahead) == allowed
    left = {int(path.name, 16) for path in shelf._folder.glob("?" * 32)}
    assert left == set(range(len(sizes))) - (set(going) if allowed else set())
    os.close(shelf._locks)


# Full disks


class FullDisk:
    """A remote whose downloads meet a disk of so many bytes."""

    def __init__(self, remote, folder, capacity):
        self.remote, self.folder, self.capacity, self.prefix = remote, folder, capacity, remote.prefix

    def download(self, name, path, size, sha256):
        if sum(path.stat().st_size for path in self.folder.glob("?" * 32)) + size > self.capacity:
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise UserError("files: the disk is full") from cause
        self.remote.download(name, path, size, sha256)


def test_a_disk_fuller_than_the_limit_allows_for_is_coped_with(make, tmp_path):
    storage = make(6)
    storage._remote = FullDisk(storage._remote, tmp_path / "cache", 2 * SIZE)
    assert [read(storage, name) for name in "abcdef"] == [True] * 6
    assert len(cached(storage)) == 2


def test_a_disk_without_any_room_is_an_error_with_the_way_out(make, tmp_path):
    storage = make(6)
    storage._remote = FullDisk(storage._remote, tmp_path / "cache", 100)
    with pytest.raises(
        UserError, match=r"no room for .*/shards/a \(10,000 bytes\) on the disk of .*MiB free.*free some"
    ):
        read(storage, "a")


def test_a_real_disk_that_is_full_is_coped_with(make, tmp_path):
    (tmp_path / "cache").mkdir()
    mount = shutil.which("mount")
    tmpfs = [mount, "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(tmp_path / "cache")]
    if os.geteuid() or mount is None or subprocess.run(tmpfs, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        storage = make(6)
        assert [read(storage, name) for name in "abcdefabcdef"] == [True] * 12
        assert 2 <= len(cached(storage)) <= 4
        assert not list(storage._folder.glob(".*"))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "cache")], check=True)


def test_a_folder_without_locks_is_refused(make, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with pytest.raises(UserError, match=r"without locks; choose a folder on the node's own disk"):
        make()


# Fetching ahead


def test_what_is_expected_is_fetched_ahead_soonest_first_as_far_as_there_is_room(distant, proxy):
    small = CachedStorage(distant._remote, distant._folder, 2 * SIZE, distant.__reduce__()[1][3])
    small.expect(["shards/c", "shards/a", "shards/b"])
    wait_for(lambda: cached(small) == "ac")
    assert [path[-1] for path in proxy.requests("GET")] == ["c", "a"]
    small.expect(["shards/a", "shards/b"])  # c is done with
    wait_for(lambda: cached(small) == "ab")
    assert read(small, "a") and read(small, "b")
    assert [path[-1] for path in proxy.requests("GET")] == ["c", "a", "b"]


def test_fetching_ahead_goes_on_after_the_store_failed(distant, proxy, monkeypatch):
    monkeypatch.setenv("NITSCALE_S3_RETRY_SECONDS", "0")
    proxy.add(3, status=503)
    distant.expect(["shards/a", "shards/b"])
    wait_for(lambda: cached(distant) == "ab")
    assert not proxy.pending()


def test_the_thread_ends_with_its_storage_and_what_it_expected_is_forgotten(make):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "fetch ahead"]

    wait_for(lambda: not threads())
    storage = make()
    storage.expect(["shards/a"])
    folder = storage._folder
    wait_for(lambda: cached(storage) == "a")
    assert len(threads()) == 1
    assert list(folder.glob("process-*"))
    storage = None
    wait_for(lambda: not threads())
    assert not list(folder.glob("process-*"))


def test_a_forked_process_that_expects_has_a_thread_of_its_own(make):
    storage = make()
    storage.expect(["shards/a"])
    wait_for(lambda: cached(storage) == "a")

    def expect_others():
        storage.expect(["shards/b"])
        return bool(wait_for(lambda: cached(storage) == "ab"))

    assert in_another_process(expect_others)


def test_expecting_an_object_that_is_no_shard_is_an_error(make):
    with pytest.raises(KeyError):
        make().expect(["manifest.json"])


def test_nothing_of_a_user_in_the_folder_is_touched(make):
    storage = make(1)
    mine = Path(storage._folder, "notes.txt")
    mine.write_text("mine")
    for name in "abc":
        read(storage, name)
    assert mine.read_text() == "mine"
