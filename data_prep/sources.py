"""Sources of images, local or in an object store: folders, ImageNet as it is distributed, SA-1B, WebDataset.

A source divides its images into partitions, the same on every machine, and yields the items of one; an item knows its
class or caption and reads its bytes when asked.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from data_prep.captions import read_captions
from data_prep.catalogs import WORDNET_ID, Catalog, CatalogSource, list_folder, scan_class_tars
from data_prep.folders import IMAGE_SUFFIXES, find_images, hidden
from data_prep.items import ImageItem, Partition, first_members
from data_prep.mixed import TarSource, sa1b_label, webdataset_label
from nitscale.data.foreign import read_classes
from nitscale.data.storage import Storage, open_object, open_storage
from nitscale.errors import UserError

KINDS = ("folder", "imagenet", "sa1b", "webdataset")
LOOKED_AT = 32
"""Members of the first tar by which a source is recognised."""


class Source(Protocol):
    """Images to encode."""

    classes: tuple[str, ...] | None
    """None: labels are the numbers found, and the manifest names the classes by them."""
    digest: str
    """Of names and sizes: tells another archive from this one."""
    ignored: dict[str, int]
    """Number of files that are no images, by suffix."""

    def partitions(self, images: int) -> list[Partition]:
        """Of about `images` images each, where the source can be cut anywhere."""

    def items(self, partition: Partition) -> Iterator[ImageItem]:
        """The images of a partition, in order. UserError if its tar is damaged."""


def open_source(
    uri: str | Path,
    kind: str = "auto",
    captions: str | Path | None = None,
    classes: str | Path | Sequence[str] | None = None,
    catalog: bytes | None = None,
) -> Source:
    """The source at `uri`: a folder or s3:// prefix, or one tar.

    `captions`: JSONL or Parquet with columns image_id and caption, for SA-1B. `classes`: names, or a file with one a
    line, for WebDataset whose samples name their class. `catalog`: what `Catalog.to_bytes` gave, to scan no tars again.
    UserError if there is nothing of the kind.
    """
    if kind not in ("auto", *KINDS):
        raise UserError(f"images: unknown kind of source {kind!r}; choose one of {', '.join(KINDS)}")
    storage, found = list_source(uri, kind)
    tars = {name: size for name, size in found.items() if name.endswith(".tar")}
    kind = recognise(storage, found, tars) if kind == "auto" else kind
    if kind == "folder" or (kind == "imagenet" and not tars):
        return CatalogSource(storage, list_folder(storage, uri))
    if not tars:
        raise UserError(f"images: no .tar below {uri}, which kind {kind!r} needs; use --kind folder for image files")
    if kind == "imagenet":
        scanned = Catalog.from_bytes(catalog, tars) if catalog is not None else scan_class_tars(storage, tars)
        return CatalogSource(storage, scanned)
    if kind == "sa1b":
        texts = read_captions(captions) if captions is not None else None
        return TarSource(storage, tars, ("image",), lambda sample: sa1b_label(sample, texts))
    names = read_classes(Path(classes)) if isinstance(classes, (str, Path)) else classes
    numbers = None if names is None else {name: number for number, name in enumerate(names)}
    return TarSource(
        storage, tars, None if names is None else tuple(names), lambda sample: webdataset_label(sample, numbers)
    )


def list_source(uri: str | Path, kind: str) -> tuple[Storage, dict[str, int]]:
    """The storage of a source, and its files with their bytes; of a folder of images only what `list_folder` lacks."""
    if str(uri).lower().endswith(".tar"):
        storage, name = open_object(uri)
        try:
            return storage, {name: storage.size(name)}
        except FileNotFoundError:
            raise UserError(f"images: there is no tar {uri}; name a folder of images, or a tar of them") from None
    storage = open_storage(uri)
    if "://" not in str(uri) and not Path(uri).is_dir():
        find_images(uri)  # says what is wrong
    return storage, {} if kind == "folder" else storage.list("", recursive=True)


def recognise(storage: Storage, found: dict[str, int], tars: dict[str, int]) -> str:
    """The kind of a source by its files, and the first members of its first tar. UserError if it could be several."""
    if not tars:
        return "folder"
    first = next(iter(tars))
    loose = next((name for name in found if name.lower().endswith(IMAGE_SUFFIXES)), None)
    if loose is not None:
        raise UserError(
            f"images: {storage.prefix} has both tars (such as {first}) and images (such as {loose}); "
            f"say with --kind which to use: {', '.join(KINDS)}"
        )
    if all(WORDNET_ID.fullmatch(Path(name).stem) for name in tars):
        return "imagenet"
    names = [member.name for member in first_members(storage, first, LOOKED_AT) if not hidden(member.name)]
    if any(name.endswith(".tar") for name in names):
        return "imagenet"
    if any(re.fullmatch(r"(.*/)?sa_\d+\.(jpg|json)", name) for name in names):
        return "sa1b"
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return "webdataset"
    raise UserError(
        f"images: {storage.prefix} has {len(tars):,} tars, but no image is among the first members of {first} "
        f"({', '.join(names[:5]) or 'it is empty'}); name another source, or say with --kind what it is"
    )
