"""Strict decoding: a file is a whole image of sane size, or it is refused with a reason.

The result is always 8-bit RGB, upright: EXIF orientation applied, alpha over white; grey, palette, CMYK and 16-bit
images converted.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
"""Decoders that are tried, whatever the file's suffix: few, because every decoder is a way in for a malicious file."""


class UnreadableImage(Exception):
    """Why a file is not an image that can be used."""


def decode_image(file: Path | bytes, max_pixels: int) -> Image.Image:
    """The image in a file, or in its contents, as 8-bit RGB; of an animation the first frame.

    UnreadableImage if it is damaged, cut, or has more than `max_pixels` pixels.

    The number of pixels is read from the header, before memory is taken for them. Pillow's own process-wide
    `Image.MAX_IMAGE_PIXELS` (89,478,485, an error at twice that) holds as well.
    """
    try:
        with Image.open(opened(file), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage(f"{height} x {width} pixels are more than encode.max_input_pixels={max_pixels}")
            if image.format == "PNG":
                check_png(file)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("not a JPEG, PNG or WebP file") from error
    except Exception as error:  # a decoder fed with damaged bytes raises nearly anything; the reason is what matters
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableImage(reason.replace(str(file), file.name) if isinstance(file, Path) else reason) from error


def opened(file: Path | bytes) -> Path | io.BytesIO:
    """What Pillow opens."""
    return io.BytesIO(file) if isinstance(file, bytes) else file


def check_png(file: Path | bytes) -> None:
    """Check the checksums of all chunks, which Pillow skips for pixel data while it decodes."""
    with Image.open(opened(file), formats=("PNG",)) as image:
        image.verify()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode → 8-bit RGB; transparent parts become white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255 rather than scale
        levels = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(np.rint(levels).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
