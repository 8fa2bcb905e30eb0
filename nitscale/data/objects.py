"""What a storage is: objects under a prefix, read whole or by range and written whole or not at all.

Here are the interface that local folders and object stores share, the names that it admits, what goes wrong with an
object, and an object as a file.
"""

import errno
import io
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from nitscale.errors import UserError

CHUNK_BYTES = 1 << 20
"""Read from a connection, copied or hashed at a time."""


class Storage(Protocol):
    """Objects under a prefix. Names are relative, with forward slashes: `shards/000000.tar`. UserError for names that
    lead out of the prefix, and for what a user has to mend: credentials, permissions, buckets, full disks."""

    prefix: str

    def read(self, name: str) -> bytes:
        """The whole object. FileNotFoundError if there is none."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. OSError if the object is missing, ends before, or was replaced since
        the last range that this storage read from it."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace the object at once, never in part."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """True: the object is now this call's. False: another's was there first, and stays."""

    def create(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write a large object to: published whole on a normal exit, removed on an exception. Replaces
        what has that name."""

    def download(self, name: str, path: Path, size: int, sha256: str | None = None) -> None:
        """Bring the object of `size` bytes to the local file `path`, which appears whole and checked, or not at all. An
        interrupted download is taken up where it stopped. OSError if the object is missing or something else."""

    def exists(self, name: str) -> bool: ...

    def size(self, name: str) -> int:
        """Bytes of the object. FileNotFoundError if there is none."""

    def list(self, folder: str, recursive: bool = False) -> dict[str, int]:
        """Finished objects in `folder` ("" for the prefix itself): name → bytes, sorted by name. Empty if there is no
        such folder. Hidden objects (a part of the name begins with a dot) are left out."""

    def delete(self, name: str) -> None:
        """Remove the object, if there is one."""

    def forget(self, name: str) -> None:
        """Keep nothing of the object from earlier reads, because its bytes were found wrong."""

    def exclusive(self, purpose: str) -> AbstractContextManager[None]:
        """Hold a local prefix as its only writer; UserError if another process does. Does nothing for an object store,
        where writers agree by `put_if_absent`."""


class StorageError(OSError, UserError):
    """An object that cannot be read or written as it should be. Names the object and the way out."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class MissingObject(StorageError, FileNotFoundError):
    """There is no such object."""


def check_name(name: str, prefix: str) -> None:
    """UserError unless `name` names one object under the prefix, the same one locally and on S3."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise UserError(f"storage: {name!r} leads out of {prefix}; names are relative, without '..'")
    if "" in parts or "." in parts or "\0" in name:
        raise UserError(f"storage: {name!r} is no name of an object in {prefix}: it has an empty part or a bare dot")


def check_size(uri: str, found: int, expected: int) -> None:
    if found != expected:
        raise StorageError(
            errno.EIO, f"storage: {uri} has {found:,} bytes instead of {expected:,}; copy it again or make it anew"
        )


def damaged(uri: str, found: str = "", expected: str | None = None) -> StorageError:
    """The error of an object whose bytes have the sha256 `found` instead of `expected`, or, where that is None, do not
    match the store's own checksum."""
    reason = f"its sha256 is {found} instead of {expected}" if expected else "it does not match its store's checksum"
    return StorageError(errno.EIO, f"storage: {uri} is damaged: {reason}; copy it again or make it anew")


class RangedFile(io.RawIOBase):
    """An object as a seekable file to read from, for tarfile and the like."""

    def __init__(self, storage: Storage, name: str, buffer_bytes: int = 4 << 20) -> None:
        """Reads `buffer_bytes` or more at a time. FileNotFoundError if there is no such object."""
        self.name = f"{storage.prefix}/{name}"
        self._storage, self._object, self._buffer_bytes = storage, name, buffer_bytes
        self._size = storage.size(name)
        self._position = self._start = 0
        self._buffer = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"storage: position {base + offset} of {self.name} is negative")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")
        done = 0
        while done < len(wanted) and self._position < self._size:
            begin = self._position - self._start
            if not 0 <= begin < len(self._buffer):
                length = min(max(self._buffer_bytes, len(wanted) - done), self._size - self._position)
                self._buffer = self._storage.read_range(self._object, self._position, length)
                self._start, begin = self._position, 0
            piece = memoryview(self._buffer)[begin : begin + len(wanted) - done]
            wanted[done : done + len(piece)] = piece
            done += len(piece)
            self._position += len(piece)
        return done

    def readall(self) -> bytes:
        return self.read(max(0, self._size - self._position)) or b""
