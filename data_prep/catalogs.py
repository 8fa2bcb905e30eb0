"""Sources whose images are known one by one before any is read: folders, and ImageNet as it is distributed.

They lie ordered by class, so the catalog is put in a fixed random order and cut: no shard is of one class. Images are
read at their offsets, in a tar of tars too; nothing is ever unpacked.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.folders import IMAGE_SUFFIXES, find_images, readable, unique_key
from data_prep.items import HEADER_BYTES, ImageItem, Partition, damaged, first_members, reader
from nitscale.data.index import index_bytes, read_arrays
from nitscale.data.storage import RangedFile, Storage
from nitscale.data.tars import DamagedTar, Member, scan
from nitscale.errors import UserError
from nitscale.randomness import permutation

SCANNERS = 16
"""Class tars that are scanned at once."""


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

    def digest(self) -> str:
        """sha256 of names and sizes."""
        lines = (f"{name}\x1f{size}\n" for name, size in zip(self.names, self.length.tolist(), strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The catalog as a file, so that a job array scans an archive once."""
        texts = {"classes": self.classes, "objects": self.objects, "names": self.names}
        arrays = {name: np.frombuffer("\n".join(lines).encode(), np.uint8) for name, lines in texts.items()}
        numbers = {name: getattr(self, name) for name in ("object_of", "offset", "length", "label")}
        return index_bytes(arrays | numbers)

    @classmethod
    def from_bytes(cls, data: bytes, tars: dict[str, int]) -> "Catalog":
        """The catalog in a file. UserError if it is damaged or of other tars."""
        columns = ("classes", "objects", "names", "object_of", "offset", "length", "label")
        try:
            arrays = read_arrays(data, columns)
            classes, objects, names = (tuple(arrays[n].tobytes().decode().split("\n")) for n in columns[:3])
            numbers = tuple(arrays[name] for name in columns[3:])
            ends = arrays["offset"] + arrays["length"]
            sizes = np.array([tars[name] for name in objects])
            if {len(column) for column in numbers} != {len(names)} or (ends > sizes[arrays["object_of"]]).any():
                raise ValueError("its columns do not agree")
        except Exception as error:  # of a damaged file, anything
            raise UserError(
                f"images: the catalog of the source is damaged or of other tars ({error!r}); remove it"
            ) from error
        object_of, offset, length, label = numbers
        return cls(classes, objects, names, object_of, offset, length, label)


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
    """The images of a folder or prefix: classes are its sub-folders, sorted by name."""
    if "://" not in str(uri):
        folder = find_images(uri)
        paths = [image.path.relative_to(folder.root).as_posix() for image in folder.images]
        sizes = [image.path.stat().st_size for image in folder.images]
        labels, classes, ignored = [image.label for image in folder.images], folder.classes, folder.ignored
    else:
        found = storage.list("", recursive=True)
        images = {name: size for name, size in found.items() if name.lower().endswith(IMAGE_SUFFIXES)}
        if not images:
            raise UserError(
                f"images: no {', '.join(IMAGE_SUFFIXES)} below {uri}; convert the images or name another prefix"
            )
        loose = [name for name in images if "/" not in name]
        if loose and len(loose) < len(images):
            raise UserError(f"images: {uri} has images of its own (such as {loose[0]}) beside class folders")
        classes = ("images",) if loose else tuple(sorted({name.split("/")[0] for name in images}))
        number = {name: i for i, name in enumerate(classes)}
        paths, sizes = list(images), list(images.values())
        labels = [0 if loose else number[path.split("/")[0]] for path in paths]
        others = (Path(name).suffix.lower() or "without suffix" for name in found if name not in images)
        ignored = dict(Counter(others))
    nothing = np.full(len(paths), -1)
    names = tuple(readable(path) for path in paths)
    every = np.arange(len(paths))
    return Catalog(classes, tuple(paths), names, every, nothing, np.array(sizes), np.array(labels), ignored)


def scan_class_tars(storage: Storage, tars: dict[str, int]) -> Catalog:
    """ImageNet's class tars, objects of their own or members of one tar; class index = sorted WordNet ids."""
    class_tars: list[tuple[str, str, int, int]] = []  # wordnet id, object, offset, bytes
    if len(tars) == 1 and any(m.name.endswith(".tar") for m in first_members(storage, next(iter(tars)), 1)):
        (outer,) = tars
        try:
            members = [m for m in scan(RangedFile(storage, outer, HEADER_BYTES)) if m.name.endswith(".tar")]
        except DamagedTar as error:
            raise damaged(storage, outer, error) from error
        class_tars = [(Path(member.name).stem, outer, member.offset, member.size) for member in members]
    else:
        class_tars = [(Path(name).stem, name, 0, size) for name, size in tars.items()]
    class_tars.sort()
    ids = [wordnet_id for wordnet_id, *_ in class_tars]
    if len(set(ids)) < len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        raise UserError(f"images: {storage.prefix} has two tars of class {twice}; remove one")

    def members_of(entry: tuple[str, str, int, int]) -> list[Member]:
        wordnet_id, name, offset, size = entry
        try:
            return list(scan(Window(storage, name, offset, size)))
        except DamagedTar as error:
            raise damaged(storage, f"{name} ({wordnet_id})", error) from error

    with ThreadPoolExecutor(SCANNERS, thread_name_prefix="scan") as pool:
        found = list(pool.map(members_of, class_tars))
    objects = tuple(dict.fromkeys(name for _, name, *_ in class_tars))
    rows: list[tuple[int, int, int, int, str]] = []
    ignored: Counter[str] = Counter()
    for label, ((wordnet_id, name, offset, _), members) in enumerate(zip(class_tars, found, strict=True)):
        images = [member for member in members if member.name.lower().endswith(IMAGE_SUFFIXES)]
        ignored.update(Path(m.name).suffix.lower() or "without suffix" for m in members if m not in images)
        if not images:
            raise UserError(f"images: the tar of class {wordnet_id} in {storage.prefix} has no image; remove it")
        for member in images:
            image = f"{wordnet_id}/{readable(member.name.rpartition('/')[2])}"
            rows.append((objects.index(name), offset + member.offset, member.size, label, image))
    object_of, offsets, lengths, labels, names = zip(*rows, strict=True)
    return Catalog(
        tuple(ids), objects, names, np.array(object_of), np.array(offsets), np.array(lengths), np.array(labels),
        dict(ignored),
    )  # fmt: skip


class Window(RangedFile):
    """A stretch of an object as a file of its own: a tar in a tar."""

    def __init__(self, storage: Storage, name: str, offset: int, size: int) -> None:
        super().__init__(_Stretch(storage, offset, size), name, HEADER_BYTES)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Stretch:
    """A storage that knows only a stretch of its objects."""

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
