"""What every source of images gives: partitions, and the items of one."""

from collections.abc import Callable
from dataclasses import dataclass

from nitscale.data.storage import RangedFile, Storage
from nitscale.data.tars import DamagedTar, Member, scan
from nitscale.errors import UserError

LARGEST_IMAGE = 256 * 2**20
"""Bytes of an image file; larger ones are skipped before they are read."""
HEADER_BYTES = 1 << 16
"""Read at a time from an object store while a tar is scanned for its members."""


class OversizedImage(Exception):
    """An image file that is too large to be read."""


@dataclass(frozen=True)
class Partition:
    """Some images of a source."""

    name: str
    """The same on every machine; sorts in the source's order."""
    num_images: int | None
    """None before a tar is scanned."""
    start: int
    """First position in the catalog's order, or in the list of tars."""


@dataclass(frozen=True)
class ImageItem:
    """One image of a source."""

    name: str
    """What messages call it."""
    key: str
    """Of its sample in a shard: unique, without dots."""
    label: int
    text: str | None
    read: Callable[[], bytes]
    """The file's bytes; called in decoding threads. OSError or OversizedImage if they cannot be read."""


def reader(storage: Storage, name: str, offset: int, length: int, keep: object = None) -> Callable[[], bytes]:
    """A function that reads an image, and keeps `keep` alive until then."""

    def read(keep: object = keep) -> bytes:
        if length > LARGEST_IMAGE:
            raise OversizedImage(f"{length:,} bytes are more than {LARGEST_IMAGE:,}")
        return storage.read(name) if offset < 0 else storage.read_range(name, offset, length)

    return read


def first_members(storage: Storage, name: str, count: int) -> list[Member]:
    """The first members of a tar, fewer if it is damaged after some; UserError if it is before the first."""
    members: list[Member] = []
    try:
        for member in scan(RangedFile(storage, name, HEADER_BYTES)):
            members.append(member)
            if len(members) == count:
                break
    except DamagedTar as error:
        if not members:
            raise damaged(storage, name, error) from error
    return members


def damaged(storage: Storage, name: str, error: Exception) -> UserError:
    return UserError(
        f"images: {storage.prefix}/{name} is damaged ({error}); bring it again from where it came, or move it away"
    )
