"""Sources whose tars are mixed already: SA-1B, and any WebDataset of images. One tar is one partition, in its order.

A local tar is read in place, one of an object store is brought whole to a scratch folder first. Nothing is ever
unpacked by its name.
"""

import hashlib
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.captions import Captions
from data_prep.folders import IMAGE_SUFFIXES, hidden, readable, unique_key
from data_prep.items import ImageItem, OversizedImage, Partition, damaged, reader
from nitscale.data.storage import Storage, open_storage
from nitscale.data.tars import DamagedTar, Member, scan

LARGEST_TEXT = 2**20
"""Bytes of a .json, .cls or .txt member."""


@dataclass
class TarSample:
    """One sample of a WebDataset tar: members of one key, read when asked."""

    key: str
    members: dict[str, Member]
    """By suffix, "jpg"."""
    file: Callable[[Member], bytes]

    def text(self, suffix: str) -> str | None:
        """A small text member, None if there is none. ValueError if it is too large or no UTF-8."""
        member = self.members.get(suffix)
        if member is None:
            return None
        if member.size > LARGEST_TEXT:
            raise ValueError(f"{member.name} has {member.size:,} bytes")
        return self.file(member).decode()

    def json(self) -> dict[str, Any]:
        """The .json member, empty if there is none. ValueError if it is none."""
        try:
            content = json.loads(self.text("json") or "{}")
        except RecursionError:
            raise ValueError(f"{self.key}.json is nested too deeply") from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.key}.json is no object")
        return content


class TarSource:
    """Images in mixed tars; one tar is one partition."""

    def __init__(
        self,
        storage: Storage,
        tars: dict[str, int],
        classes: tuple[str, ...] | None,
        describe: Callable[[TarSample], tuple[int, str | None]],
    ) -> None:
        """`describe` gives a sample's label and text; ValueError or KeyError if it has none."""
        self.storage, self.tars, self.classes, self._describe = storage, dict(sorted(tars.items())), classes, describe
        self.ignored: dict[str, int] = {}
        self.digest = hashlib.sha256("".join(f"{n}\x1f{s}\n" for n, s in self.tars.items()).encode()).hexdigest()

    def partitions(self, images: int) -> list[Partition]:
        taken: set[str] = set()
        return [Partition(unique_key(name.replace("/", "-"), taken), None, i) for i, name in enumerate(self.tars)]

    def items(self, partition: Partition) -> Iterator[ImageItem]:
        name = list(self.tars)[partition.start]
        local, object_name, scratch = self._at_hand(name)
        stem, taken = partition.name, set[str]()
        try:
            with Path(local.prefix, object_name).open("rb") as file:
                for sample in samples(file, scan(file)):
                    suffix = next((s for s in sample.members if f".{s}" in IMAGE_SUFFIXES), None)
                    if suffix is None:
                        continue
                    member = sample.members[suffix]
                    shown = f"{name}/{readable(member.name)}"
                    read = reader(local, object_name, member.offset, member.size, keep=scratch)
                    try:
                        label, text = self._describe(sample)
                    except (ValueError, KeyError, TypeError) as error:
                        label, text, read = 0, None, failing(f"its description cannot be used: {error}")
                    yield ImageItem(shown, unique_key(f"{stem}/{sample.key}.x", taken), label, text, read)
        except DamagedTar as error:
            raise damaged(self.storage, name, error) from error

    def _at_hand(self, name: str) -> tuple[Storage, str, object]:
        """The tar on local disk: a storage, the object's name, and what must live as long as it is read."""
        if "://" not in self.storage.prefix:
            return self.storage, name, None
        folder = Path(tempfile.mkdtemp(prefix="nitscale-tar-"))
        scratch = _Scratch()
        weakref.finalize(scratch, shutil.rmtree, folder, ignore_errors=True)
        self.storage.download(name, folder / "images.tar", self.tars[name])
        return open_storage(folder), "images.tar", scratch


class _Scratch:
    """Lives as long as somebody may read from a scratch folder."""


def failing(reason: str) -> Callable[[], bytes]:
    """A `read` of an image that cannot be used."""

    def read() -> bytes:
        raise OversizedImage(reason)

    return read


def samples(file: BinaryIO, members: Iterable[Member]) -> Iterator[TarSample]:
    """Members that stand together and have one key, as WebDataset groups them: a key ends at the first dot of the
    file's name. A suffix that comes again begins another sample; hidden members (macOS adds some) are left out."""

    def contents(member: Member) -> bytes:
        position = file.tell()
        file.seek(member.offset)
        data = file.read(member.size)
        file.seek(position)
        return data

    sample: TarSample | None = None
    for member in members:
        if hidden(member.name):
            continue
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key, suffix = folder + slash + stem, suffix.lower()
        if sample is None or sample.key != key or suffix in sample.members:
            if sample is not None:
                yield sample
            sample = TarSample(key, {}, contents)
        sample.members[suffix] = member
    if sample is not None:
        yield sample


def webdataset_label(sample: TarSample, classes: dict[str, int] | None) -> tuple[int, str | None]:
    """Label from .cls, or from .json's label or class, by number or by name; text from .txt, or .json's caption."""
    about = sample.json()
    found = sample.text("cls") or about.get("label", about.get("class"))
    text = sample.text("txt") or about.get("caption", about.get("text"))
    if text is not None and not isinstance(text, str):
        raise ValueError(f"its caption {text!r} is no text")
    if found is None:
        if text is None and classes is not None:
            raise ValueError("it has neither .cls nor a label or class in its .json")
        return 0, text
    found = str(found).strip()
    if found.isascii() and found.isdigit() and (classes is None or int(found) < len(classes)):
        return int(found), text
    if classes is None or found not in classes:
        raise ValueError(f"class {found!r} is not in the list of classes; give --classes FILE with one name a line")
    return classes[found], text


def sa1b_label(sample: TarSample, captions: Captions | None) -> tuple[int, str | None]:
    """No class, and the caption of SA-1B's image id, empty if there is none for it; None without captions.

    The id stands in the name, and in the .json, which is large (the image's masks) and read only if it must be."""
    if captions is None:
        return 0, None
    match = re.fullmatch(r"(?:.*/)?sa_(\d{1,18})", sample.key)
    image_id = match[1] if match else (sample.json().get("image") or {}).get("image_id")
    if image_id is None:
        raise ValueError("neither its name nor its .json has an image_id")
    return 0, captions.get(int(image_id)) or ""
