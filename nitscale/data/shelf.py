"""How the processes of a node share a folder of cached files under a limit of bytes.

Each process has one view of the folder, a `Shelf`, and tells in a small file what it wants, soonest first, and what it
is fetching. Locks are ranges of one lock file, which the kernel frees when a process ends in any way: one range for the
folder, held for moments; one for each file, held by who fetches it; one for each process, held as long as it lives.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitscale.errors import UserError
from nitscale.files import NO_LOCKS, disk_errors

FOLDER, PROCESSES, ENTRIES = 0, 1 << 61, 1 << 62
"""Where in the lock file the ranges of the folder, the processes and the entries (60 bits each) begin."""
NEVER = float("inf")


def shelf_of(folder: Path) -> "Shelf":
    """This process's view of a folder. There is one only: closing any descriptor of the lock file frees all locks that
    a process holds in it."""
    shelf = _shelves.get(folder)
    if shelf is None:
        with _shelves_lock:
            shelf = _shelves.get(folder)
            if shelf is None:
                shelf = _shelves[folder] = Shelf(folder)
    return shelf


_shelves: dict[Path, "Shelf"] = {}
_shelves_lock = threading.Lock()
_inherited: list[Any] = []
"""Views of parent processes, whose descriptors stay open."""


def _after_fork() -> None:
    """A forked process has none of its parent's locks or threads, and so needs a view of its own."""
    global _shelves, _shelves_lock
    _inherited.append(_shelves)
    _shelves, _shelves_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Found:
    """What is in the folder."""

    sizes: dict[str, int]
    """Bytes of each entry that is there and that nobody is fetching."""
    used: dict[str, float]
    """Time of each such entry's last use."""
    leftovers: dict[Path, int]
    """Bytes of what broken-off downloads left."""
    reserved: int
    """Bytes of the entries that are being fetched."""
    needed: dict[str, int]
    """How soon each entry is expected to be needed: its least position in anybody's list."""


class Shelf:
    """One process's view of a folder of entries, files whose names are 32 hexadecimal digits."""

    def __init__(self, folder: Path) -> None:
        """UserError if the folder cannot be made, or has no locks."""
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._locks = os.open(folder / "locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._folder, self._process = folder, secrets.randbits(60)
        self._mutex = threading.RLock()  # record locks exclude other processes only
        self._busy: set[str] = set()
        self._wanted: dict[int, list[str]] = {}
        self._fetching: dict[str, int] = {}
        self._warned = False
        self._lock(PROCESSES + self._process)

    def want(self, owner: int, entries: list[str]) -> None:
        """What an owner (any number) in this process expects to need, soonest first."""
        with self._mutex:
            before = self._wanted.pop(owner, [])
            if entries:
                self._wanted[owner] = entries
            if entries != before:
                self._publish()

    def begin(self, entry: str) -> bool:
        """Become the one who fetches an entry. False if somebody is."""
        with self._mutex:
            if entry in self._busy or not self._lock(ENTRIES + int(entry[:15], 16)):
                return False
            self._busy.add(entry)
            return True

    def end(self, entry: str) -> None:
        """The entry was fetched, or not."""
        with self._mutex:
            if self._fetching.pop(entry, None) is not None:
                self._publish()
            self._unlock(ENTRIES + int(entry[:15], 16))
            self._busy.discard(entry)

    def is_busy(self, entry: str) -> bool:
        """Whether somebody is fetching the entry."""
        if self.begin(entry):
            self.end(entry)
            return False
        return True

    def make_room(self, entry: str, size: int, limit: int, ahead: int | None) -> bool:
        """Reserve `size` bytes for an entry that the caller has begun, by removing others until all is within `limit`.
        False, and nothing is removed, if that is not possible, or not without what is needed at or before position
        `ahead` (None: everything may go)."""
        with self._alone():
            found = self._look(entry)
            excess = sum(found.sizes.values()) + sum(found.leftovers.values()) + found.reserved + size - limit
            if not self._remove(found, excess, ahead, entry):
                return False
            self._fetching[entry] = size
            self._publish()
            return True

    def evict(self, entry: str, size: int, ahead: int | None) -> bool:
        """Remove what frees `size` bytes, or all there is. False if nothing was removed."""
        with self._alone():
            found = self._look(entry)
            there = sum(found.sizes.values()) + sum(found.leftovers.values())
            return there > 0 and self._remove(found, min(size, there), ahead, entry)

    def _remove(self, found: Found, excess: int, ahead: int | None, entry: str) -> bool:
        """Remove at least `excess` bytes of leftovers and entries: first what nobody expects, the longest unused first,
        then what is needed latest."""
        going: list[Path] = []
        for path, size in found.leftovers.items():
            if excess > 0:
                going.append(path)
                excess -= size
        need = found.needed
        for other in sorted(found.sizes, key=lambda other: (-need.get(other, NEVER), found.used[other])):
            if excess <= 0:
                break
            if ahead is not None and need.get(other, NEVER) <= ahead:
                return False
            if need.get(other, NEVER) <= need.get(entry, -1):
                self._warn()
            going.append(self._folder / other)
            excess -= found.sizes[other]
        if excess > 0:
            return False
        for path in going:
            path.unlink(missing_ok=True)  # whoever reads it has it open, and can go on
        return True

    def _look(self, entry: str) -> Found:
        """What is in the folder, but for `entry` itself."""
        wanted, fetching = [list(self._wanted.values())], {**self._fetching}
        for path in self._folder.glob("process-*"):
            process = int(path.stem.removeprefix("process-"), 16)
            if process != self._process:
                told = self._told(path, process)
                wanted.append(told["wanted"])
                fetching |= told["fetching"]
        fetching.pop(entry, None)
        needed: dict[str, int] = {}
        for entries in (entries for lists in wanted for entries in lists):
            for position, other in enumerate(entries):
                needed[other] = min(position, needed.get(other, position))
        found = Found({}, {}, {}, sum(fetching.values()), needed)
        for item in os.scandir(self._folder):
            match = re.fullmatch(r"(\.?)([0-9a-f]{32})(\..+\.tmp)?", item.name)
            if match is None or match[2] == entry or match[2] in fetching:
                continue
            with suppress(FileNotFoundError):
                status = item.stat()
                if not match[3]:
                    found.sizes[match[2]], found.used[match[2]] = status.st_size, status.st_mtime
                elif not self.is_busy(match[2]):
                    found.leftovers[Path(item)] = status.st_size
        return found

    def _told(self, path: Path, process: int) -> dict[str, Any]:
        """What another process tells. Removes the file of a dead one."""
        nothing: dict[str, Any] = {"wanted": [], "fetching": {}}
        if self._lock(PROCESSES + process):
            path.unlink(missing_ok=True)
            self._unlock(PROCESSES + process)
            return nothing
        try:
            return nothing | (json.loads(path.read_bytes()) if path.suffix == ".json" else {})
        except (OSError, ValueError):  # it has just ended; or a disk lost the file's contents
            return nothing

    def _publish(self) -> None:
        """Tell the others. A full disk is no obstacle: they then know what was told last."""
        path = self._folder / f"process-{self._process:015x}.json"
        with suppress(OSError):
            if not self._wanted and not self._fetching:
                return path.unlink(missing_ok=True)
            temporary = path.with_suffix(".new")
            temporary.write_text(json.dumps({"wanted": list(self._wanted.values()), "fetching": self._fetching}))
            os.replace(temporary, path)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"cache: what is read at once on this node does not fit into the cache {self._folder}; raise its "
                "limit, or shards are fetched again and again",
                stacklevel=2,
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process or thread looks at the folder or removes from it."""
        with self._mutex:
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, FOLDER)
            try:
                yield
            finally:
                self._unlock(FOLDER)

    def _lock(self, begin: int) -> bool:
        """Take a range of the lock file. False if another process has it; true if this one has it already."""
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, begin)
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise UserError(
                    f"cache: {self._folder} lies on a file system without locks; choose a folder on the node's own disk"
                ) from error
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True

    def _unlock(self, begin: int) -> None:
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, begin)
