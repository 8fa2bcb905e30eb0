"""Sources whose images are known one by one before any is read: folders, and ImageNet as it is distributed.

They lie ordered by class, so the catalog is put in a fixed random order and cut: no shard is of one class. Images are
read at their offsets, in a tar of tars too; nothing is ever unpacked.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.folders import IMAGE_SUFFIXES, find_images, hidden, readable, unique_key
from data_prep.items import HEADER_BYTES, ImageItem, Partition, damaged, first_members, reader
from nitscale.data.index import index_bytes, read_arrays
from nitscale.data.storage import RangedFile, Storage
from nitscale.data.tars import DamagedTar, Member, scan
from nitscale.errors import UserError
from nitscale.randomness import permutation

SCANNERS, SCAN_BYTES = 16, 1 << 20
"""Class tars of an object store that are scanned at once, and bytes of a request. ImageNet's images have 110 kB: to ask
for each header alone would take ten times as many requests, and longer than to read everything."""
LOCAL_SCANNERS, LOCAL_SCAN_BYTES = 4, 1 << 11
"""The same for local tars, of which only the headers are read."""
WORDNET_ID = re.compile(r"n\d{8}")
TEXTS = ("classes", "objects", "names", "ignored", "tars")
NUMBERS = ("object_of", "offset", "length", "label")


@dataclass(frozen=True, eq=False)
class Catalog:
    """Where every image of a source lies; one entry an image."""

    classes: tuple[str, ...]
    objects: tuple[str, ...]
    """Object names: files of images, or tars."""
    names: tuple[str, ...]
    """What messages call each image."""
    object_of: np.ndarray
    offset: np.ndarray
    """First byte in its tar; -1 for an object that is the image."""
    length: np.ndarray
    label: np.ndarray
    ignored: dict[str, int] = field(default_factory=dict)
    tars: dict[str, int] = field(default_factory=dict)
    """Bytes of every tar that was scanned."""

    def digest(self) -> str:
        """sha256 of names and sizes."""
        lines = (f"{name}\x1f{size}\n" for name, size in zip(self.names, self.length.tolist(), strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The catalog as a file, so that a job array scans an archive once."""
        texts = json.dumps({name: getattr(self, name) for name in TEXTS}).encode()
        return index_bytes({"texts": np.frombuffer(texts, np.uint8)} | {name: getattr(self, name) for name in NUMBERS})

    @classmethod
    def from_bytes(cls, data: bytes, tars: dict[str, int]) -> "Catalog":
        """The catalog in a file. UserError if it is damaged, of other tars, or of tars that have changed since."""
        try:
            arrays = read_arrays(data, ("texts", *NUMBERS))
            texts = json.loads(arrays.pop("texts").tobytes())
            classes, objects, names = (tuple(map(str, texts[name])) for name in TEXTS[:3])
            object_of, offset, length, label = (arrays[name] for name in NUMBERS)
            ignored, scanned = dict(texts["ignored"]), dict(texts["tars"])
            catalog = cls(classes, objects, names, object_of, offset, length, label, ignored, scanned)
            if catalog.tars != tars:
                raise ValueError("the tars have other names or sizes")
            catalog.check()
        except Exception as error:  # of a damaged file, anything
            raise UserError(
                f"images: the catalog of the source is damaged or of other tars ({error!r}); remove it"
            ) from error
        return catalog

    def check(self) -> None:
        """ValueError unless every image lies within its tar and is of a class."""
        columns = [getattr(self, name) for name in NUMBERS]
        sizes = np.array([self.tars[name] for name in self.objects])
        if (
            {column.shape for column in columns} != {(len(self.names),)}
            or min(column.min() for column in columns) < 0
            or self.label.max() >= len(self.classes)
            or (self.offset + self.length > sizes[self.object_of]).any()
        ):
            raise ValueError("its columns do not agree")


class CatalogSource:
    """Images that are known one by one, in a fixed random order."""

    def __init__(self, storage: Storage, catalog: Catalog) -> None:
        self.storage, self.catalog = storage, catalog
        self.classes: tuple[str, ...] | None = catalog.classes
        self.digest = catalog.digest()
        self.ignored = catalog.ignored
        taken: set[str] = set()
        self._keys = [unique_key(name, taken) for name in catalog.names]
        self._order = permutation(len(catalog.names), "encode", "order")

    def partitions(self, images: int) -> list[Partition]:
        total = len(self._order)
        starts = range(0, total, images)
        return [Partition(f"{n:06d}", min(images, total - start), start) for n, start in enumerate(starts)]

    def items(self, partition: Partition) -> Iterator[ImageItem]:
        catalog = self.catalog
        for i in self._order[partition.start : partition.start + (partition.num_images or 0)].tolist():
            place = (catalog.objects[catalog.object_of[i]], int(catalog.offset[i]), int(catalog.length[i]))
            read = reader(self.storage, *place)
            yield ImageItem(catalog.names[i], self._keys[i], int(catalog.label[i]), None, read)


def list_folder(storage: Storage, uri: str | Path) -> Catalog:
    """The images of a folder or prefix: classes are its sub-folders, sorted by name. UserError as of `find_images`."""
    if "://" not in str(uri):
        folder = find_images(uri)
        paths = [image.path.relative_to(folder.root).as_posix() for image in folder.images]
        sizes = [image.path.stat().st_size for image in folder.images]
        labels, classes, ignored = [image.label for image in folder.images], folder.classes, folder.ignored
    else:
        found = storage.list("", recursive=True)
        paths = [name for name in found if name.lower().endswith(IMAGE_SUFFIXES)]
        sizes = [found[name] for name in paths]
        ignored = count_suffixes(name for name in found if not name.lower().endswith(IMAGE_SUFFIXES))
        classes, labels = classes_of_prefix(str(uri), paths, found, ignored)
    nothing = np.full(len(paths), -1)
    names = tuple(readable(path) for path in paths)
    every = np.arange(len(paths))
    return Catalog(classes, tuple(paths), names, every, nothing, np.array(sizes), np.array(labels), ignored)


def classes_of_prefix(
    uri: str, paths: Sequence[str], found: Iterable[str], ignored: dict[str, int]
) -> tuple[tuple[str, ...], list[int]]:
    """Classes of an object store's prefix, and the label of each image at `paths`; `found` are all its objects."""
    if not paths:
        seen = ", ".join(f"{n} {suffix}" for suffix, n in Counter(ignored).most_common(5)) or "nothing"
        raise UserError(
            f"images: no {', '.join(IMAGE_SUFFIXES)} below {uri} (found {seen}); "
            "convert the images or name another prefix"
        )
    loose = [path for path in paths if "/" not in path]
    if len(loose) == len(paths):
        return (uri.rstrip("/").rpartition("/")[2],), [0] * len(paths)
    if loose:
        raise UserError(
            f"images: {uri} has images of its own (such as {loose[0]}) beside class folders; move them into one"
        )
    of_images = {path.split("/")[0] for path in paths}
    empty = sorted({name.split("/")[0] for name in found if "/" in name} - of_images)
    if empty:
        raise UserError(f"images: class folder {uri}/{empty[0]} has no image; put some there or remove the folder")
    number = {name: i for i, name in enumerate(sorted(of_images))}
    return tuple(number), [number[path.split("/")[0]] for path in paths]


def count_suffixes(names: Iterable[str]) -> dict[str, int]:
    """Number of files by suffix."""
    return dict(Counter(Path(name).suffix.lower() or "without suffix" for name in names))


def scan_class_tars(storage: Storage, tars: dict[str, int]) -> Catalog:
    """ImageNet's class tars, objects of their own or members of one tar; class index = sorted WordNet ids.

    UserError for a tar that is damaged or not of a class, two of one class, or a class without images."""
    class_tars = sorted(find_class_tars(storage, tars))
    remote = "://" in storage.prefix
    buffer_bytes, scanners = (SCAN_BYTES, SCANNERS) if remote else (LOCAL_SCAN_BYTES, LOCAL_SCANNERS)

    def members_of(entry: tuple[str, str, int, int]) -> list[Member]:
        wordnet_id, name, offset, size = entry
        try:
            tar = RangedFile(_Stretch(storage, offset, size), name, buffer_bytes)  # type: ignore[arg-type]
            return [member for member in scan(tar) if not hidden(member.name)]
        except DamagedTar as error:
            raise damaged(storage, f"{name} ({wordnet_id})", error) from error

    with ThreadPoolExecutor(scanners, thread_name_prefix="scan") as pool:
        found = list(pool.map(members_of, class_tars))
    number = {name: i for i, name in enumerate(sorted(tars))}
    rows: list[tuple[int, int, int, int]] = []
    names, others = list[str](), list[str]()
    for label, ((wordnet_id, tar, offset, _), members) in enumerate(zip(class_tars, found, strict=True)):
        images = [member for member in members if member.name.lower().endswith(IMAGE_SUFFIXES)]
        others += [member.name for member in members if not member.name.lower().endswith(IMAGE_SUFFIXES)]
        if not images:
            raise UserError(f"images: the tar of class {wordnet_id} in {storage.prefix} has no image; remove it")
        rows += [(number[tar], offset + member.offset, member.size, label) for member in images]
        names += [f"{wordnet_id}/{readable(member.name.rpartition('/')[2])}" for member in images]
    object_of, offsets, lengths, labels = np.array(rows, np.int64).T.copy()
    classes = tuple(wordnet_id for wordnet_id, *_ in class_tars)
    ignored = count_suffixes(others)
    return Catalog(classes, tuple(number), tuple(names), object_of, offsets, lengths, labels, ignored, dict(tars))


def find_class_tars(storage: Storage, tars: dict[str, int]) -> list[tuple[str, str, int, int]]:
    """WordNet id, object, first byte and bytes of each class tar."""
    found = [(name, name, 0, size) for name, size in tars.items()]
    if len(tars) == 1 and any(m.name.endswith(".tar") for m in first_members(storage, next(iter(tars)), 1)):
        (outer,) = tars
        try:
            members = [m for m in scan(RangedFile(storage, outer, HEADER_BYTES)) if m.name.endswith(".tar")]
        except DamagedTar as error:
            raise damaged(storage, outer, error) from error
        found = [(member.name, outer, member.offset, member.size) for member in members if not hidden(member.name)]
    seen: set[str] = set()
    for name, *_ in found:
        wordnet_id = Path(name).stem
        if not WORDNET_ID.fullmatch(wordnet_id):
            raise UserError(
                f"images: {storage.prefix} has {name}, which is no tar of an ImageNet class (n01440764.tar); "
                "name the one tar of class tars, or a folder of class tars alone, or use another --kind"
            )
        if wordnet_id in seen:
            raise UserError(f"images: {storage.prefix} has two tars of class {wordnet_id}; remove one")
        seen.add(wordnet_id)
    return [(Path(name).stem, tar, offset, size) for name, tar, offset, size in found]


@dataclass(frozen=True)
class _Stretch:
    """A storage that knows only a stretch of its objects: a tar in a tar."""

    storage: Storage
    offset: int
    length: int

    @property
    def prefix(self) -> str:
        return self.storage.prefix

    def size(self, name: str) -> int:
        return self.length

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        return self.storage.read_range(name, self.offset + offset, length)
