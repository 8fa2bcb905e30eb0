"""Sources of images, local or in an object store: folders, ImageNet as it is distributed, SA-1B, WebDataset.

A source divides its images into partitions, the same on every machine, and yields the items of one; an item knows its
class or caption and reads its bytes when asked.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from data_prep.catalogs import Catalog, CatalogSource, list_folder, scan_class_tars
from data_prep.folders import find_images
from data_prep.items import ImageItem, Partition, first_members
from data_prep.mixed import TarSource, read_captions, sa1b_label, webdataset_label
from nitscale.data.foreign import read_classes
from nitscale.data.storage import Storage, open_object, open_storage
from nitscale.errors import UserError

KINDS = ("folder", "imagenet", "sa1b", "webdataset")


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
    classes: str | Path | None = None,
    catalog: bytes | None = None,
) -> Source:
    """The source at `uri`: a folder or s3:// prefix, or one tar.

    `captions`: JSONL or Parquet with columns image_id and caption, for SA-1B. `classes`: a file with one class name a
    line, for WebDataset whose samples name their class. `catalog`: what `Catalog.to_bytes` gave, to scan no tars again.
    UserError if there is nothing of the kind.
    """
    if kind not in ("auto", *KINDS):
        raise UserError(f"images: unknown kind of source {kind!r}; choose one of {', '.join(KINDS)}")
    if str(uri).lower().endswith(".tar"):
        storage, name = open_object(uri)
        try:
            tars = {name: storage.size(name)}
        except FileNotFoundError:
            raise UserError(f"images: there is no tar {uri}; name a folder of images, or a tar of them") from None
    else:
        storage = open_storage(uri)
        if "://" not in str(uri) and not Path(uri).is_dir():
            find_images(uri)  # says what is wrong
        tars = {name: size for name, size in storage.list("", recursive=True).items() if name.endswith(".tar")}
    kind = recognise(storage, tars) if kind == "auto" else kind
    if kind == "folder" or (kind == "imagenet" and not tars):
        return CatalogSource(storage, list_folder(storage, uri))
    if not tars:
        raise UserError(f"images: no .tar below {uri}, which kind {kind!r} needs; use --kind folder for image files")
    if kind == "imagenet":
        found = Catalog.from_bytes(catalog, tars) if catalog is not None else scan_class_tars(storage, tars)
        return CatalogSource(storage, found)
    names = read_classes(Path(classes) if classes is not None else None)
    if kind == "sa1b":
        texts = read_captions(captions) if captions is not None else None
        return TarSource(storage, tars, ("image",), lambda sample: sa1b_label(sample, texts))
    return TarSource(storage, tars, names, lambda sample: webdataset_label(sample, names))


def recognise(storage: Storage, tars: dict[str, int]) -> str:
    """The kind of a source by its tars, and the first members of the first one."""
    if not tars:
        return "folder"
    if all(re.fullmatch(r"(.*/)?n\d{8}\.tar", name) for name in tars):
        return "imagenet"
    first = next(iter(tars))
    names = [member.name for member in first_members(storage, first, 4)]
    if any(name.endswith(".tar") for name in names):
        return "imagenet"
    if any(re.fullmatch(r"(.*/)?sa_\d+\.(jpg|json)", name) for name in names):
        return "sa1b"
    return "webdataset"
