"""Where a dataset lies: a prefix holding named objects, read whole or by range and written atomically.

The interface is small on purpose, so that an object store fits behind it. This build reads and writes local folders.
"""

import errno
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from nitscale.errors import UserError
from nitscale.files import atomic_file, atomic_write, exclusive_lock, remove_leftovers

OPEN_FILES = 64
"""Files that one process keeps open for ranged reads."""


class Storage(Protocol):
    """Objects under a prefix. Names are relative, with forward slashes: `shards/000000.tar`."""

    prefix: str

    def read(self, name: str) -> bytes:
        """The whole object. FileNotFoundError if there is none."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. OSError if the object is missing or ends before."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace the object at once, never in part. UserError if the disk refuses."""

    def create(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write a large object to: published on a normal exit, removed on an exception."""

    def exists(self, name: str) -> bool: ...

    def size(self, name: str) -> int:
        """Bytes of the object. FileNotFoundError if there is none."""

    def list(self, folder: str) -> list[str]:
        """Sorted names of the finished objects directly in `folder`; empty if there is no such folder."""

    def exclusive(self, purpose: str) -> AbstractContextManager[None]:
        """Hold the prefix as its only writer. UserError if another process does."""


def open_storage(prefix: str | Path) -> Storage:
    """The storage behind `prefix`, a folder. UserError for schemes that this build does not read."""
    text = str(prefix)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # one slash will do: a Path swallows the other
        raise UserError(
            f"storage: this build reads local folders only, got {text!r}; "
            "copy the dataset to a local folder and name that"
        )
    return LocalStorage(text)


class LocalStorage:
    """A folder of a local or shared file system."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._open_files: OrderedDict[str, FileIO] = OrderedDict()

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        # pread does not move the file's position, so worker processes may share descriptors inherited by fork.
        data = os.pread(self._open(name).fileno(), length, offset)
        while 0 < len(data) < length:
            more = os.pread(self._open(name).fileno(), length - len(data), offset + len(data))
            if not more:
                break
            data += more
        if len(data) != length:
            self._open_files.pop(name, None)  # a retry opens the file anew
            raise OSError(errno.EIO, f"{len(data)} of {length} bytes at offset {offset}: the file is truncated", name)
        return data

    def write(self, name: str, data: bytes) -> None:
        atomic_write(self._path(name), data)

    def create(self, name: str) -> AbstractContextManager[Path]:
        return atomic_file(self._path(name))

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def size(self, name: str) -> int:
        return self._path(name).stat().st_size

    def list(self, folder: str) -> list[str]:
        root = self._path(folder)
        if not root.is_dir():
            return []
        return sorted(f"{folder}/{path.name}" for path in root.iterdir() if not path.name.startswith("."))

    @contextmanager
    def exclusive(self, purpose: str) -> Iterator[None]:
        with exclusive_lock(self._path(".lock"), f"{purpose} {self.prefix}"):
            for folder in (".", "shards", "index", "commits"):
                remove_leftovers(self._path(folder))
            yield

    def _path(self, name: str) -> Path:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"storage: {name!r} leads out of the dataset {self.prefix}")
        return Path(self.prefix, name)

    def _open(self, name: str) -> FileIO:
        file = self._open_files.get(name)
        if file is None:
            file = self._open_files[name] = FileIO(self._path(name))
            if len(self._open_files) > OPEN_FILES:
                self._open_files.popitem(last=False)  # closed as soon as nobody reads from it
        self._open_files.move_to_end(name)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "_open_files": OrderedDict()}  # an open file cannot go to a spawned process
