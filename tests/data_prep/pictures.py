"""Image files for tests."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth picture with a bright upper left corner."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * np.exp(-(y / height + x / width)), 80 + 60 * np.sin(x / 7 + seed), 80 + 60 * np.cos(y / 5 + seed)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def make_folder(root: Path, classes: int = 2, images: int = 4, seed: int = 0) -> Path:
    """A folder of `classes` sub-folders of PNG and JPEG files of several sizes."""
    for label in range(classes):
        (root / f"class-{label}").mkdir(parents=True)
        for i in range(images):
            size = [(32, 32), (48, 33), (20, 70)][(label + i) % 3]
            suffix = "jpg" if i % 2 else "png"
            picture(*size, seed=seed + 10 * label + i).save(root / f"class-{label}" / f"{i}.{suffix}")
    return root


def png(height: int, width: int, seed: int = 0) -> bytes:
    """The contents of a PNG file with a picture."""
    picture(height, width, seed).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of members (name, contents)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path
