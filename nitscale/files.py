"""Files that are either whole or absent: atomic writes, published folders, locks, and clear words when a disk refuses.

Everything that a later step could take for finished goes through here: write beside the target under a hidden `.tmp`
name, fsync, rename, fsync the folder. A process killed at any point leaves at most a `.tmp` file, which nothing reads.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nitscale.errors import UserError

READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Lustre and some others are often mounted without support for locks."""
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""Object stores and FAT disks that are mounted as folders have no second names for a file."""
NOT_A_FOLDER = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path`: a reader sees the old file or the new one, never a part. UserError as `disk_errors`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a normal exit it becomes `path` durably, on an exception it is removed.

    Missing parent folders are made. UserError as `disk_errors`.
    """
    temporary = temporary_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_create(path: Path, data: bytes) -> bool:
    """Write `data` to `path` if there is nothing yet: of all who try at once one gets True, and its file is whole from
    the first moment. UserError as `disk_errors`."""
    temporary = temporary_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            fsync(temporary)
            created = _link(temporary, path)
            fsync(path.parent)
            return created
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give `temporary` the name `path` too, unless that exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return os.stat(temporary).st_nlink > 1  # over NFS a request may be repeated whose reply was lost
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with open(path.with_name(".create.lock"), "w") as lock:
            with suppress(OSError):  # without links and without locks there is nothing to hold on to
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return False
            os.replace(temporary, path)
    return True


def temporary_path(path: Path) -> Path:
    """A new name beside `path` for what is to become it: hidden, and telling host, process and a random number, because
    several hosts may write to one folder at once."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def publish_folder(staging: Path, final: Path) -> None:
    """Make the finished folder `staging` appear as `final` by one rename, with everything in it on disk before.

    Both must be on one file system. UserError if `final` already exists with something in it, or as `disk_errors`.
    """
    with disk_errors(final):
        for folder, _, names in os.walk(staging):
            for name in names:
                fsync(Path(folder, name))
            fsync(Path(folder))
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(staging, final)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UserError(
                    f"files: {final} already exists and is never overwritten; remove or rename it"
                ) from error
            raise
        fsync(final.parent)


@contextmanager
def exclusive_lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock file `path` for the length of the block; the kernel frees it when the process ends in any way.

    UserError that names the holder if another process has it. `purpose` completes "another process is …".
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path = path.resolve()
        if path in _held_locks:
            raise UserError(f"files: this process is already {purpose}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held_locks.add(path)
    try:
        try:
            # A record lock belongs to this process alone; with flock, children that it forked would keep it alive.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"files: another process (id {holder}) is {purpose}; wait for it to end, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{path.parent} lies on a file system without locks: take care not to run twice", stacklevel=3
            )
        with suppress(OSError):  # a full disk must not prevent a lock; the id is only for the message
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        _held_locks.discard(path)
        os.close(descriptor)


_held_locks: set[Path] = set()
"""Locks of this process: a record lock does not exclude a second holder in it, and closing any descriptor frees it."""


def remove_leftovers(folder: Path) -> None:
    """Delete the `.tmp` files and folders in `folder` that dead processes of this host left. Those of other hosts stay:
    whether their writers live cannot be seen from here."""
    for path in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\..*\.([^.]+)\.(\d+)\.[0-9a-f]{8}\.tmp", path.name)
        if match and match[1] == _host() and not _is_alive(int(match[2])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _host() -> str:
    """Where a process id means what it means here: the host's name, and in a container its process namespace, because
    containers may have the host's name, or all the same."""
    name = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64]
    with suppress(OSError):  # no /proc: not Linux, or hidden
        namespace = os.stat("/proc/self/ns/pid").st_ino
        return name if namespace == FIRST_NAMESPACE else f"{name}-{namespace:x}"
    return name


FIRST_NAMESPACE = 0xEFFFFFFC
"""PROC_PID_INIT_INO of Linux: the process namespace of the host itself."""


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's process; a number that is none of ours
        return True
    return True


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk's refusal to write `path` (full, read-only, a file in the way) into a UserError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(
                f"files: the disk is full: cannot write {path} ({free_space(path)}); "
                "free some space or choose a folder on another disk, then run again"
            ) from error
        if error.errno in READ_ONLY:
            raise UserError(
                f"files: not allowed to write {path} ({os.strerror(error.errno).lower()}); "
                "change its permissions or choose another folder"
            ) from error
        if error.errno in NOT_A_FOLDER:
            obstacle = error.filename2 or error.filename or path
            raise UserError(f"files: cannot write {path}: {obstacle} is in the way ({error.strerror})") from error
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"files: cannot write {path}: the name is too long; choose a shorter folder") from error
        raise


def free_space(path: Path) -> str:
    """The free space where `path` lies, in words."""
    existing = next((p for p in [path, *path.parents] if p.exists()), Path("/"))
    return f"{shutil.disk_usage(existing).free / 2**20:,.0f} MiB free"


def fsync(path: Path) -> None:
    """Bring a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
