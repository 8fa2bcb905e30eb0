"""Strict decoding: a file is a whole image of sane size, or it is refused with a reason.

The result is always 8-bit RGB, upright: EXIF orientation applied, alpha over white; grey, palette, CMYK and 16-bit
images converted. Colour profiles are not applied. Of an animation it is the first frame.
"""

import io
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
"""Decoders that are tried, whatever the file's suffix: few, because every decoder is a way in for a malicious file."""
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
"""What libjpeg calls Pillow's modes of a JPEG."""
HARMLESS = ("extraneous bytes before marker 0xd9", "unknown JFIF revision", "Unknown Adobe", "Invalid SOS parameters")
"""Warnings of libjpeg about whole images: bytes behind the last scan, and headers as some cameras write them."""


class UnreadableImage(Exception):
    """Why a file is not an image that can be used."""


def decode_image(file: Path | bytes, max_pixels: int) -> Image.Image:
    """The image in a file, or in its contents, as 8-bit RGB; of an animation the first frame.

    UnreadableImage if it is damaged, cut, or has more than `max_pixels` pixels.

    The number of pixels is read from the header, before memory is taken for them. Pillow's own process-wide
    `Image.MAX_IMAGE_PIXELS` (89,478,485, an error at twice that) holds as well.
    """
    try:
        data = file.read_bytes() if isinstance(file, Path) else file
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage(f"{height} x {width} pixels are more than encode.max_input_pixels={max_pixels}")
            if image.format == "PNG":
                check_png(data)
            jpeg = data.startswith(b"\xff\xd8")
            return to_rgb(upright(decode_jpeg(data, image) if jpeg else image))
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("not a JPEG, PNG or WebP file") from error
    except Exception as error:  # a decoder fed with damaged bytes raises nearly anything; the reason is what matters
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableImage(reason.replace(str(file), file.name) if isinstance(file, Path) else reason) from error


def decode_jpeg(data: bytes, header: Image.Image) -> Image.Image:
    """The pixels of a JPEG whose header Pillow has read: L, RGB, or CMYK with 255 for full ink, and its EXIF data.

    Both decode by libjpeg-turbo, to the same pixels. But Pillow 13 passes over what libjpeg calls warnings: it makes a
    grey stripe of what is missing from a scan. UnreadableImage or ValueError if anything is.
    """
    if not jpeg_ends(data):
        raise UnreadableImage("JPEG without an end: the file is truncated")
    space = SPACES[header.mode]
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != header.size[::-1]:
            raise UnreadableImage("JPEG with two sizes")  # of which only one was compared with the limit
        pixels = simplejpeg.decode_jpeg(data, space, strict=True)
    except ValueError as error:
        if not any(text in str(error) for text in HARMLESS):
            raise
        pixels = np.asarray(header).reshape(header.height, header.width, -1)
        pixels = 255 - pixels if space == "CMYK" else pixels  # as stored
    if header.mode == "CMYK" and "adobe" in header.info:
        pixels = 255 - pixels  # Photoshop and its followers store 0 for full ink
    image = Image.fromarray(pixels[..., 0] if space == "GRAY" else pixels, header.mode)
    image.info = header.info
    return image


def jpeg_ends(data: bytes) -> bool:
    """Whether an end-of-image mark follows the first scan. Bytes behind it do not matter."""
    position = 2
    while data[position] == 0xFF:
        kind = data[position + 1]
        if kind == 0xDA:
            return data.find(b"\xff\xd9", position) > 0
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        position += 1 if kind == 0xFF else 2 + length
    return False


def check_png(data: bytes) -> None:
    """Check the checksums of all chunks, which Pillow skips for pixel data while it decodes."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.verify()


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, if it has EXIF data that can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except SyntaxError:  # Pillow's word for data that is no EXIF data
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode → 8-bit RGB; transparent parts become white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255 rather than scale
        levels = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(np.rint(levels).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
