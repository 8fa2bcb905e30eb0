"""Whole shards of a remote dataset on the node's disk, fetched ahead, and shared by all processes of the node.

Who needs a shard that is not there fetches it, unless another process already does: then it waits. Every process tells
which shards it expects to need, soonest first, so that room is made by removing first what nobody expects, then what is
needed latest (`nitscale.data.shelf`). A process that is killed leaves nothing that another would take for whole: locks
are the kernel's, files appear by renaming once size and hash are right, half a download is taken up or removed.
"""

import hashlib
import itertools
import json
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from nitscale.data.folder import OpenFiles
from nitscale.data.objects import Storage
from nitscale.data.shelf import Shelf, shelf_of
from nitscale.errors import UserError
from nitscale.files import DISK_FULL, free_space

OPEN_SHARDS = 16
"""Cached shards that one process keeps open. Few: the disk of a removed one is free only once nobody has it open."""
POLL_SECONDS = 0.02
"""How often a process looks whether the shard that another fetches has come."""
PAUSE_SECONDS = 2.0
"""How long fetching ahead rests when it can do no more: room may be made, and what was fetched may be removed."""
FULL_SECONDS = 10.0
"""How long we wait on a full disk, when nothing is left to remove, for processes to close what was removed."""
TRUST_SECONDS = 60.0
"""How long a cached shard counts as right after its hash was. Who forgets a shard for each of many wrong samples does
not have it hashed each time, let alone fetched: it is the index that is wrong."""


@dataclass(frozen=True)
class Shard:
    """A shard and its place in the cache."""

    entry: str
    """Name of its file, which also tells its prefix and its content: no two shards share one."""
    size: int
    sha256: str


class CachedStorage:
    """A remote storage. Ranges of shards are read from copies on the node's disk; the rest goes to the remote."""

    def __init__(
        self, remote: Storage, folder: str | Path, limit_bytes: int, shards: Mapping[str, tuple[int, str]]
    ) -> None:
        """`folder` holds at most `limit_bytes` for all datasets and processes together, and must be on a local disk.
        `shards`: object name → (bytes, sha256). UserError if one alone is over the limit, or the folder cannot be."""
        self.prefix = remote.prefix
        self._remote, self._folder, self._limit = remote, Path(folder).absolute(), limit_bytes
        self._shards = {
            name: Shard(_entry(remote.prefix, name, size, sha256), size, sha256)
            for name, (size, sha256) in shards.items()
        }
        largest = max(self._shards, key=lambda name: self._shards[name].size, default=None)
        if largest is not None and self._shards[largest].size > limit_bytes:
            raise UserError(
                f"cache: the limit of {limit_bytes:,} bytes is less than the {self._shards[largest].size:,} of "
                f"{self.prefix}/{largest}; raise it to several times that"
            )
        self._open_files = OpenFiles(OPEN_SHARDS)
        self._expected: list[str] = []
        self._number = next(_numbers)
        self._fetcher: tuple[int, threading.Event] | None = None
        """The process whose thread fetches ahead for this object, and what wakes it."""
        self._found_right: dict[str, tuple[int, float]] = {}
        """(inode, time) of files whose hash was right."""
        shelf_of(self._folder)  # complain about the folder now

    def __reduce__(self) -> tuple[Any, ...]:
        shards = {name: (shard.size, shard.sha256) for name, shard in self._shards.items()}
        return CachedStorage, (self._remote, self._folder, self._limit, shards)

    def __repr__(self) -> str:
        return f"CachedStorage({self._remote!r}, {str(self._folder)!r})"

    def expect(self, names: Sequence[str]) -> None:
        """This process will read these shards, soonest first, and no others. Begins to fetch them, as far as there is
        room without removing what anybody needs sooner."""
        mine = self._fetcher is not None and self._fetcher[0] == os.getpid()  # and not of the process that forked this
        if mine and list(names) == self._expected:
            return
        self._expected = list(names)
        shelf_of(self._folder).want(self._number, [self._shards[name].entry for name in names])
        if not mine:
            wake = threading.Event()
            arguments = (weakref.ref(self), self._number, self._folder, wake)
            # A daemon, so that it does not keep the process from ending; what it was fetching is then taken up later.
            threading.Thread(target=_fetch_ahead, args=arguments, name="fetch ahead", daemon=True).start()
            weakref.finalize(self, wake.set).atexit = False
            self._fetcher = os.getpid(), wake
        assert self._fetcher is not None
        self._fetcher[1].set()

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if name in self._shards:
            return self._open_files.read_range(name, offset, length, self._open)
        return self._remote.read_range(name, offset, length)

    def forget(self, name: str) -> None:
        """Of a shard: hash the cached copy, and remove it if it is wrong."""
        shard = self._shards.get(name)
        if shard is None:
            return self._remote.forget(name)
        self._open_files.forget(name)
        path = self._folder / shard.entry
        with suppress(FileNotFoundError), open(path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            known, since = self._found_right.get(name, (0, 0.0))
            if known == inode and time.monotonic() < since + TRUST_SECONDS:
                return
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                self._found_right[name] = inode, time.monotonic()
            elif path.stat().st_ino == inode:  # nobody has replaced it meanwhile
                path.unlink()

    def read(self, name: str) -> bytes:
        return self._remote.read(name)

    def write(self, name: str, data: bytes) -> None:
        self._remote.write(name, data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return self._remote.put_if_absent(name, data)

    def create(self, name: str) -> AbstractContextManager[Path]:
        return self._remote.create(name)

    def download(self, name: str, path: Path, size: int, sha256: str | None = None) -> None:
        self._remote.download(name, path, size, sha256)

    def exists(self, name: str) -> bool:
        return self._remote.exists(name)

    def size(self, name: str) -> int:
        return self._remote.size(name)

    def list(self, folder: str, recursive: bool = False) -> dict[str, int]:
        return self._remote.list(folder, recursive)

    def delete(self, name: str) -> None:
        self._remote.delete(name)

    def exclusive(self, purpose: str) -> AbstractContextManager[None]:
        return self._remote.exclusive(purpose)

    def _open(self, name: str) -> FileIO:
        """The cached copy, fetched if need be."""
        shard = self._shards[name]
        self._let_go()
        while True:
            file = self._cached(shard) or self._fetch(name, None)
            if file is not None:
                os.utime(file.fileno())  # the time of its last use
                return file
            time.sleep(POLL_SECONDS)

    def _let_go(self) -> None:
        """Close the shards that were removed from the cache: only then their disk is free."""
        for name in self._open_files.names():
            file = self._open_files.get(name)
            if file is not None and os.fstat(file.fileno()).st_nlink == 0:
                self._open_files.forget(name)

    def _cached(self, shard: Shard) -> FileIO | None:
        with suppress(FileNotFoundError):
            file = FileIO(self._folder / shard.entry)
            if os.fstat(file.fileno()).st_size == shard.size:
                return file
        return None

    def _fetch(self, name: str, ahead: int | None) -> FileIO | None:
        """Fetch a shard. None if another process or thread does, or if there is no room: at all if `ahead` is None, or
        but for what is needed before position `ahead`."""
        shard, shelf = self._shards[name], shelf_of(self._folder)
        if not shelf.begin(shard.entry):
            return None
        try:
            file = self._cached(shard)
            if file is None and shelf.make_room(shard.entry, shard.size, self._limit, ahead):
                self._download(name, shard, shelf, ahead)
                file = self._cached(shard)  # before it may be removed to make room
            return file
        finally:
            shelf.end(shard.entry)

    def _download(self, name: str, shard: Shard, shelf: Shelf, ahead: int | None) -> None:
        deadline = time.monotonic() + FULL_SECONDS
        while True:
            try:
                return self._remote.download(name, self._folder / shard.entry, shard.size, shard.sha256)
            except UserError as error:
                if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in DISK_FULL:
                    raise
                # Fuller than the limit allows for: others use the disk too, or read what was removed.
                if shelf.evict(shard.entry, shard.size, ahead):
                    self._let_go()
                elif ahead is None and time.monotonic() < deadline:
                    time.sleep(FULL_SECONDS / 10)
                else:
                    raise UserError(
                        f"cache: no room for {self.prefix}/{name} ({shard.size:,} bytes) on the disk of {self._folder} "
                        f"({free_space(self._folder)}), and nothing of the cache to remove; free some space or choose "
                        "a cache folder on another disk"
                    ) from error

    def _fetch_expected(self, wake: threading.Event) -> None:
        """Fetch what is expected and missing, until there is no room or something new is expected."""
        shelf = shelf_of(self._folder)
        for position, name in enumerate(self._expected):
            if wake.is_set():
                return
            shard = self._shards[name]
            with suppress(OSError, UserError):  # who needs the shard will meet the error, and tell
                if self._cached(shard) is not None or shelf.is_busy(shard.entry):
                    continue
                if self._fetch(name, position) is not None:
                    continue
            return


_numbers = itertools.count()
"""Tells the storages of a process apart."""


def _fetch_ahead(reference: "weakref.ref[CachedStorage]", owner: int, folder: Path, wake: threading.Event) -> None:
    """The thread that fetches ahead for a storage, as long as that exists."""
    while True:
        wake.wait(PAUSE_SECONDS)
        wake.clear()
        storage = reference()
        if storage is None:
            return shelf_of(folder).want(owner, [])
        storage._fetch_expected(wake)
        del storage


def _entry(*identity: Any) -> str:
    """A name of 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
