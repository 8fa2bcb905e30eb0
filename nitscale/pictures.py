"""Pictures for people: PNG files with metadata, and contact sheets with captions."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from nitscale.files import atomic_write

MARGIN = 8
INK = (40, 40, 48)
PAPER = (250, 250, 248)


@dataclass(frozen=True)
class Row:
    """A line of a contact sheet."""

    title: str
    pictures: Sequence[Tensor]
    """Each (3, H, W) in [-1, 1]."""
    captions: Sequence[str] = ()
    """Below each picture."""


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] → 8-bit RGB, rounded to the nearest level."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").cpu().numpy())


def save_png(image: Tensor | Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Write `image` atomically; `metadata` goes into the PNG's text chunk `nitscale` as JSON."""
    info = PngInfo()
    if metadata:
        info.add_text("nitscale", json.dumps(metadata))
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else to_pil(image)).save(buffer, "PNG", pnginfo=info)
    atomic_write(path, buffer.getvalue())


def contact_sheet(rows: Sequence[Row], scale: float = 1.0) -> Image.Image:
    """Rows of pictures with titles above and captions below; pictures are enlarged by `scale`, pixels kept sharp."""
    font = ImageFont.load_default(size=12)
    bold = ImageFont.load_default(size=15)
    sized = [[scaled(to_pil(picture), scale) for picture in row.pictures] for row in rows]
    caption_width = max((int(font.getlength(c)) for row in rows for c in row.captions), default=0)
    cell = max([caption_width, *(picture.width for row in sized for picture in row)]) + MARGIN
    line, title = 18, 26
    heights = [
        title + max((p.height for p in row), default=0) + (line if rows[i].captions else 0)
        for i, row in enumerate(sized)
    ]
    sheet = Image.new(
        "RGB", (cell * max(len(row) for row in sized) + MARGIN, sum(heights) + MARGIN * (len(rows) + 1)), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, pictures, height in zip(rows, sized, heights, strict=True):
        pen.text((MARGIN, top), row.title, INK, bold)
        tallest = max((p.height for p in pictures), default=0)
        for column, picture in enumerate(pictures):
            left = MARGIN + column * cell
            sheet.paste(picture, (left, top + title))
            if row.captions:
                pen.text((left, top + title + tallest + 2), row.captions[column], INK, font)
        top += height + MARGIN
    return sheet


def scaled(picture: Image.Image, scale: float) -> Image.Image:
    if scale == 1.0:
        return picture
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.NEAREST)
