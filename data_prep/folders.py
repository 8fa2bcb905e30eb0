"""Where images come from: a folder with one sub-folder a class, or with the images themselves and one class."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nitscale.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class ImageSource:
    """One image file of a folder."""

    path: Path
    name: str
    """Path relative to the folder, with forward slashes: what messages and the dataset call it."""
    label: int
    """Position of its class in the folder's list."""
    key: str
    """Name of its sample in a shard: unique, without dots."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, sorted by name."""

    root: Path
    classes: tuple[str, ...]
    images: tuple[ImageSource, ...]
    ignored: dict[str, int]
    """Number of other files by their suffix."""

    def digest(self) -> str:
        """sha256 of the names and sizes of all images: tells another set of images from this one."""
        lines = (f"{image.name}\x1f{image.path.stat().st_size}\n" for image in self.images)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def find_images(root: str | Path) -> ImageFolder:
    """The images (.jpg, .jpeg, .png, .webp) under `root`: classes are its sub-folders, sorted by name.

    A folder without sub-folders is one class, named like the folder. Hidden files and folders are passed over.
    UserError if the folder is missing, has no image, has an empty class, or has images beside its class folders.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"images: {root} {what}; name a folder with one sub-folder of images a class")
    ignored: Counter[str] = Counter()
    try:
        folders = sorted((p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)
        loose = [p for p in files_below(root, recursive=False) if is_image(p, ignored)]
        by_class = {p.name: [f for f in files_below(p) if is_image(f, ignored)] for p in folders}
    except OSError as error:
        raise UserError(f"images: cannot read {error.filename}: {error.strerror}") from error
    if not loose and not any(by_class.values()):
        seen = ", ".join(f"{n} {suffix}" for suffix, n in ignored.most_common(5)) or "nothing"
        raise UserError(
            f"images: no {', '.join(IMAGE_SUFFIXES)} below {root} (found {seen}); "
            "convert the images or name another folder"
        )
    if loose and any(by_class.values()):
        raise UserError(
            f"images: {root} has images of its own (such as {loose[0].name}) beside class folders "
            f"(such as {folders[0].name}); move them into a class folder"
        )
    if loose:
        by_class = {root.resolve().name or "images": loose}
    for name, files in by_class.items():
        if not files:
            raise UserError(f"images: class folder {root / name} has no image; put some there or remove the folder")
    images: list[ImageSource] = []
    keys: set[str] = set()
    for label, files in enumerate(by_class.values()):
        for path in files:
            name = readable(path.relative_to(root).as_posix())
            images.append(ImageSource(path, name, label, unique_key(name, keys)))
    return ImageFolder(root, tuple(readable(name) for name in by_class), tuple(images), dict(ignored))


def files_below(folder: Path, recursive: bool = True) -> list[Path]:
    """Regular files in `folder` (and below), sorted by path, without hidden ones."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.as_posix())


def is_image(path: Path, ignored: Counter[str]) -> bool:
    """Whether the suffix is one of an image that is read; counts the others in `ignored`."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    ignored[path.suffix.lower() or "without suffix"] += 1
    return False


def hidden(name: str) -> bool:
    """Whether a file or a folder in a path begins with a dot."""
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def unique_key(name: str, taken: set[str]) -> str:
    """A WebDataset key like the file's name: no dots (WebDataset ends the key there), no suffix, not in `taken`."""
    stem = name.rsplit(".", 1)[0]
    base = "".join(character if character.isalnum() or character in "/-_" else "_" for character in stem)
    key, copies = base, 1
    while key in taken:
        copies += 1
        key = f"{base}-{copies}"
    taken.add(key)
    return key


def readable(name: str) -> str:
    """The name with bytes that are not UTF-8 replaced: file names may hold any bytes, JSON may not."""
    return name.encode("utf-8", "replace").decode()


def _raise(error: OSError) -> None:
    raise error
