"""A careful tar scanner: where the files of a tar lie, and nothing else.

Python's tarfile would read a long name of gigabytes into memory, follow links when asked to, and take a tar that was
cut between two members for a whole one. Here every header's checksum is verified, sizes must fit the file, names must
stay inside, anything but regular files and folders is refused, and the end-of-archive mark must be there. Formats:
ustar, GNU (long names, large sizes) and pax (path and size).
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = 512
LONGEST_HEADER = 1 << 16
"""Bytes of a long name or of a pax header."""
REGULAR, FOLDER = (b"0", b"\0", b"7"), b"5"


class DamagedTar(ValueError):
    """What is wrong with a tar, and where."""


@dataclass(frozen=True)
class Member:
    """A regular file of a tar."""

    name: str
    offset: int
    """First byte of its contents."""
    size: int


def scan(file: IO[bytes] | io.RawIOBase) -> Iterator[Member]:
    """The regular files of a tar, in order; `file` is seekable, and may be moved between two members.

    DamagedTar where something is wrong, after the members that stand before it."""
    end = file.seek(0, os.SEEK_END)
    position, long_name, long_size = 0, None, None
    while True:
        header = read_at(file, position, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar(f"it ends at byte {position:,} without an end-of-archive mark: it was cut")
        if not any(header):
            return
        if parse_number(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise DamagedTar(f"the header at byte {position:,} has a wrong checksum")
        kind, size = header[156:157], parse_number(header[124:136])
        if kind in REGULAR and long_size is not None:
            size = long_size
        data = position + BLOCK
        position = data + -(-size // BLOCK) * BLOCK
        if data + size > end:
            raise DamagedTar(f"the member at byte {data - BLOCK:,} has {size:,} bytes, more than the file: it was cut")
        if kind in (b"L", b"x", b"g"):
            if size > LONGEST_HEADER:
                raise DamagedTar(f"the header at byte {data - BLOCK:,} has {size:,} bytes of names")
            content = read_at(file, data, size)
            if kind == b"L":
                long_name = decode(content)
            elif kind == b"x":
                records = parse_pax(content)
                long_name = records.get("path", long_name)
                long_size = parse_decimal(records["size"]) if "size" in records else long_size
            continue
        name = long_name if long_name is not None else short_name(header)
        if kind not in REGULAR and kind != FOLDER:
            raise DamagedTar(f"{name!r} is a link, a device or of an unknown kind ({kind!r})")
        check_member_name(name)
        if kind in REGULAR:
            yield Member(name, data, size)
        long_name = long_size = None


def read_at(file: IO[bytes] | io.RawIOBase, position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length) or b""


def short_name(header: bytes) -> str:
    """The name in a header, with ustar's prefix."""
    name = decode(header[:100])
    prefix = decode(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def check_member_name(name: str) -> None:
    """DamagedTar for a name that is empty, absolute, or leads out."""
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise DamagedTar(f"the name {name[:200]!r} is empty, or leads out of the archive")


def decode(field: bytes) -> str:
    """The text before the first zero byte."""
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def parse_number(field: bytes) -> int:
    """An octal number, or a base-256 one as GNU writes large sizes. DamagedTar for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b" \0").strip() or b"0", 8)
    except ValueError:
        raise DamagedTar(f"{field!r} is no number of a tar header") from None


def parse_pax(content: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header. DamagedTar if they are none."""
    records = {}
    while content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        size = parse_decimal(decode(length))
        record = content[len(length) + 1 : size]
        if not len(length) + 1 < size <= len(content) or not record.endswith(b"\n") or b"=" not in record:
            raise DamagedTar("a pax header is damaged")
        key, _, value = record[:-1].partition(b"=")
        records[decode(key)] = decode(value)
        content = content[size:]
    return records


def parse_decimal(text: str) -> int:
    """A decimal number of at most 20 digits. DamagedTar for anything else."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise DamagedTar(f"{text[:40]!r} is no number of a pax header")
    return int(text)
