import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from nitscale import files
from nitscale.errors import UserError
from nitscale.files import atomic_file, atomic_write, exclusive_lock, publish_folder

fork = multiprocessing.get_context("fork")


def hold_lock(path: Path, ready) -> None:
    with exclusive_lock(path, "encoding"):
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/lock."""
    ready = fork.Event()
    process = fork.Process(target=hold_lock, args=(tmp_path / "lock", ready))
    process.start()
    assert ready.wait(10)
    yield process
    process.kill()
    process.join()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write(path, b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_bytes(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_the_way_out_and_leaves_no_half_file(tmp_path, monkeypatch, number):
    def full(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full: cannot write .*a\.txt.*MiB free.*free some space"):
        atomic_write(tmp_path / "a.txt", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_named_with_the_way_out(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"not allowed to write .*a\.txt.*choose another folder"):
        atomic_write(tmp_path / "a.txt", b"x")


def test_a_file_where_a_folder_must_be_is_named(tmp_path):
    (tmp_path / "out").write_text("I am a file")
    with pytest.raises(UserError, match=r"out is in the way"):
        atomic_write(tmp_path / "out" / "a.txt", b"x")


def test_an_error_that_is_no_disk_error_stays_itself(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
        pass  # nothing was written to the temporary path


def test_a_published_folder_appears_whole_and_is_never_overwritten(tmp_path):
    for name in ("staging", "again"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_text(name)
    publish_folder(tmp_path / "staging", tmp_path / "final")
    assert not (tmp_path / "staging").exists()
    with pytest.raises(UserError, match="final already exists"):
        publish_folder(tmp_path / "again", tmp_path / "final")
    assert (tmp_path / "final" / "inner" / "file").read_text() == "staging"


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path, holder):
    with (
        pytest.raises(UserError, match=rf"process \(id {holder.pid}\) is encoding"),
        exclusive_lock(tmp_path / "lock", "encoding"),
    ):
        pass


def test_the_lock_is_free_when_its_holder_is_killed(tmp_path, holder):
    holder.kill()
    holder.join()
    with exclusive_lock(tmp_path / "lock", "encoding"):
        pass


def test_a_process_cannot_take_a_lock_twice_but_again_after_it_let_go(tmp_path):
    with exclusive_lock(tmp_path / "lock", "encoding"):
        with pytest.raises(UserError, match="already encoding"), exclusive_lock(tmp_path / "lock", "encoding"):
            pass
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with exclusive_lock(tmp_path / "lock", "encoding"):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.lockf", unsupported)
    with pytest.warns(UserWarning, match="without locks"), exclusive_lock(tmp_path / "lock", "encoding"):
        pass


def test_a_file_that_exists_is_not_created_again(tmp_path):
    assert files.atomic_create(tmp_path / "a" / "b", b"first")
    assert not files.atomic_create(tmp_path / "a" / "b", b"second")
    assert (tmp_path / "a" / "b").read_bytes() == b"first"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def create_and_tell(path: Path, number: int, start, winners) -> None:
    start.wait(10)
    if files.atomic_create(path, bytes([number]) * 1000):
        winners.put(number)


@pytest.mark.parametrize("links", [True, False])
def test_of_many_processes_that_create_a_file_one_succeeds(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    start, winners = fork.Event(), fork.SimpleQueue()
    arguments = [(tmp_path / "a", number, start, winners) for number in range(8)]
    processes = [fork.Process(target=create_and_tell, args=a) for a in arguments]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert (tmp_path / "a").read_bytes() == bytes([winners.get()]) * 1000
    assert winners.empty()


def test_only_what_dead_processes_of_this_host_left_is_removed(tmp_path):
    dead = fork.Process(target=int)
    dead.start()
    dead.join()
    mine = files.temporary_path(tmp_path / "a.tar")
    host = mine.name.split(".")[3]
    stay = [mine.name, mine.name.replace(host, "elsewhere").replace(str(os.getpid()), str(dead.pid)), ".a.123.tmp"]
    goes = mine.name.replace(f".{os.getpid()}.", f".{dead.pid}.")
    for name in [*stay, goes]:
        (tmp_path / name).write_bytes(b"half")
    folder = tmp_path / goes.replace("a.tar", "folder")
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"half")
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)


def test_temporary_names_of_one_file_never_meet(tmp_path):
    assert len({files.temporary_path(tmp_path / "a") for _ in range(100)}) == 100


def test_a_process_of_another_container_is_not_taken_for_one_of_this_host(monkeypatch):
    here = files._host()
    monkeypatch.setattr(files, "FIRST_NAMESPACE", -1)
    assert files._host() != here
