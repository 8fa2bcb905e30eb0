"""A folder of a local or shared file system as a storage. Ranged reads are one pread of a file that stays open."""

import errno
import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from nitscale.data.objects import CHUNK_BYTES, check_name, check_size, damaged
from nitscale.errors import UserError
from nitscale.files import atomic_create, atomic_file, atomic_write, disk_errors, exclusive_lock, remove_leftovers

OPEN_FILES = 64
"""Files that one process keeps open for ranged reads."""


class LocalStorage:
    """A folder of a local or shared file system."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._open_files = OpenFiles(OPEN_FILES)

    def __repr__(self) -> str:
        return f"LocalStorage({self.prefix!r})"

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        return self._open_files.read_range(name, offset, length, self._open)

    def write(self, name: str, data: bytes) -> None:
        atomic_write(self._path(name), data)
        self.forget(name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return atomic_create(self._path(name), data)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        with atomic_file(self._path(name)) as path:
            yield path
        self.forget(name)

    def download(self, name: str, path: Path, size: int, sha256: str | None = None) -> None:
        with open(self._path(name), "rb") as source, atomic_file(path) as temporary:
            hasher, copied = hashlib.sha256(), 0
            with open(temporary, "wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
                    hasher.update(chunk)
                    copied += len(chunk)
            uri = f"{self.prefix}/{name}"
            check_size(uri, copied, size)
            if sha256 not in (None, hasher.hexdigest()):
                raise damaged(uri, hasher.hexdigest(), sha256)

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def size(self, name: str) -> int:
        return self._path(name).stat().st_size

    def list(self, folder: str, recursive: bool = False) -> dict[str, int]:
        root = self._path(folder) if folder else Path(self.prefix)
        return dict(sorted(_files_below(root, f"{folder}/" if folder else "", recursive)))

    def delete(self, name: str) -> None:
        with disk_errors(self._path(name)):
            self._path(name).unlink(missing_ok=True)
        self.forget(name)

    def forget(self, name: str) -> None:
        self._open_files.forget(name)

    @contextmanager
    def exclusive(self, purpose: str) -> Iterator[None]:
        with exclusive_lock(self._path(".lock"), f"{purpose} {self.prefix}"):
            root = Path(self.prefix)
            for folder in [root, *(path for path in root.iterdir() if path.is_dir())]:
                remove_leftovers(folder)
            yield

    def _open(self, name: str) -> FileIO:
        return FileIO(self._path(name))

    def _path(self, name: str) -> Path:
        check_name(name, self.prefix)
        return Path(self.prefix, name)


def _files_below(
    folder: Path, prefix: str, recursive: bool, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the files in a folder. Follows links, but not to a folder that it is in."""
    try:
        here = folder.stat()
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as error:
        raise UserError(f"storage: not allowed to read the folder {folder}; change its permissions") from error
    if (here.st_dev, here.st_ino) in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:  # renamed or removed meanwhile, or a link to nothing
            continue
        if stat.S_ISREG(status.st_mode):
            yield prefix + entry.name, status.st_size
        elif recursive and stat.S_ISDIR(status.st_mode):
            below = above | {(here.st_dev, here.st_ino)}
            yield from _files_below(Path(entry), f"{prefix}{entry.name}/", True, below)


class OpenFiles:
    """Local files kept open for ranged reads, the least recently used ones closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[str, FileIO] = OrderedDict()

    def read_range(self, name: str, offset: int, length: int, open_file: Callable[[str], FileIO]) -> bytes:
        """Exactly `length` bytes of the file that `open_file(name)` opens. OSError if it ends before."""
        # Single steps, each of which another thread may come between.
        file = self._files.pop(name, None) or open_file(name)
        self._files[name] = file  # the most recently used one
        if len(self._files) > self._limit:
            self._files.popitem(last=False)  # closed as soon as nobody reads from it
        try:
            # pread does not move the file's position, so threads and forked processes may share the descriptor.
            descriptor = file.fileno()
            data = os.pread(descriptor, length, offset)
            while 0 < len(data) < length:
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
            if len(data) != length:
                raise OSError(
                    errno.EIO, f"{len(data)} of {length} bytes at offset {offset}: the file is truncated", name
                )
        except OSError:
            self.forget(name)  # a retry opens the file anew
            raise
        return data

    def get(self, name: str) -> FileIO | None:
        return self._files.get(name)

    def names(self) -> list[str]:
        return list(self._files)

    def forget(self, name: str) -> None:
        self._files.pop(name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, (self._limit,)  # an open file cannot go to a spawned process
