"""Which size an image is encoded at: pure functions of (height, width), and the resampling itself."""

import numpy as np
from PIL import Image


def native_size(height: int, width: int, multiple: int, max_size: float) -> tuple[int, int]:
    """NiT's native-resolution rule (arXiv 2506.03131, published preprocessing code) → (height, width) in pixels.

    Below max_size² pixels each side is floored to a multiple of `multiple`, at least one; from there on the image is
    first scaled to an area of max_size², keeping its aspect ratio. The floating-point operations are those of the
    published code in their order, because a different one changes the size of some images. Where that code arrives
    at a side of zero pixels (and fails), the side is one multiple.
    """
    if width * height < max_size**2:
        new_width, new_height = float(width), float(height)
    else:
        new_width = float(np.sqrt(width / height) * max_size)
        new_height = new_width * height / width
    return max(1, int(new_height / multiple)) * multiple, max(1, int(new_width / multiple)) * multiple


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at (height, width) pixels, by bicubic resampling with antialiasing, as published."""
    height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)
