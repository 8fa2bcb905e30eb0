"""Whole objects to local files: what arrives is hashed, and appears under its name only when it is what it should be.

A download that breaks off leaves its bytes under a name that tells the version of the object; the next download of that
version, in this process or another, goes on from there.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, lockf
from pathlib import Path
from typing import Any, BinaryIO

from nitscale.data.objects import CHUNK_BYTES, damaged
from nitscale.files import DISK_FULL, disk_errors, fsync, temporary_path

DAMAGED_ATTEMPTS = 3
"""Times that an object is fetched when what arrived does not match its hash."""


class Damaged(Exception):
    """All bytes arrived, but not those that were stored."""


def download(
    uri: str,
    version: str,
    path: Path,
    size: int,
    sha256: str | None,
    receive: Callable[[Callable[[bytes], object], int], object],
) -> None:
    """Bring `version` (16 hexadecimal digits) of an object to `path`. `receive(take, begin)` passes its bytes from
    `begin` on to `take`. StorageError if they are not `size` bytes of that hash; UserError as `disk_errors`."""
    found = ""
    with disk_errors(path), _file_to_download_to(path, version) as (temporary, file):
        for _ in range(DAMAGED_ATTEMPTS):
            hasher = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):  # what is there already
                hasher.update(chunk)

            def take(chunk: bytes, hasher: Any = hasher) -> None:
                file.write(chunk)
                hasher.update(chunk)

            right = sha256 is None
            try:
                if file.tell() < size:
                    receive(take, file.tell())
            except Damaged:
                right = False
            found = hasher.hexdigest()
            if file.tell() == size and (right or found == sha256):
                file.flush()
                fsync(temporary)
                os.replace(temporary, path)
                fsync(path.parent)
                return
            file.seek(0)
            file.truncate()
    raise damaged(uri, found, sha256)


@contextmanager
def _file_to_download_to(path: Path, version: str) -> Iterator[tuple[Path, BinaryIO]]:
    """The file that an earlier download of this version left, or a new one that the next may take up. If another
    process or thread works on that: one of our own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{version}.tmp")
    shared = temporary not in _downloads
    if shared:
        _downloads.add(temporary)
        try:
            with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
                if _lock(file, temporary):
                    try:
                        yield temporary, file
                    except OSError as error:
                        if error.errno in DISK_FULL:
                            temporary.unlink(missing_ok=True)
                        raise
                    return
        finally:
            _downloads.discard(temporary)
    own = temporary_path(path)
    try:
        with open(own, "w+b") as file:
            yield own, file
    finally:
        own.unlink(missing_ok=True)


_downloads: set[Path] = set()
"""Files that this process is downloading to: a record lock excludes other processes only."""


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock the file for this process, which frees it by ending in any way. False if another process has it, or has just
    given it the name that it was for."""
    try:
        lockf(file, LOCK_EX | LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
