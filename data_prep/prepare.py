"""From an image file to pixels: read it, decode it strictly, resize it by every rule, or say why not."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image

from data_prep.folders import readable
from data_prep.images import UnreadableImage, decode_image
from data_prep.items import ImageItem, OversizedImage
from data_prep.resize import Rule, apply, parse_rule
from data_prep.stages import Clock
from nitscale.errors import UserError


@dataclass(frozen=True)
class EncodeConfig:
    """What a dataset is encoded to. Another value of any field makes another dataset."""

    resize: tuple[str, ...] = ("native",)
    """Resize rules; each makes a sample of its own of every image."""
    factor: int = 16
    """Pixels of one latent cell's side, for the DCT codec."""
    channels: int = 32
    """Channels of the DCT codec's latents."""
    patch_size: int = 1
    """Latent cells of one token's side that the model will use: image sides become multiples of factor x patch_size."""
    max_tokens: int = 4096
    """Larger images are scaled down to this many tokens, as NiT does (4096 tokens of 32 pixels: 2048² pixels)."""
    max_aspect_ratio: float = 64.0
    """Images longer than this in relation to their short side are skipped."""
    max_input_pixels: int = 89_478_485
    """Larger images are skipped before they are decoded: they may be decompression bombs. Pillow's own limit is twice
    the default."""
    shard_samples: int = 2048
    """Samples of one shard."""
    fit_images: int = 512
    """Images from which the DCT codec takes the mean and standard deviation of each channel."""
    dtype: str = "float16"
    """Of the latents as stored: float16, bfloat16 or float32."""
    flips: bool = True
    """Whether the latent of every mirror image is stored, too."""
    jpeg: bool = False
    """Whether the pixels that were encoded are stored, too: JPEG of quality 95, no chroma subsampling."""
    text: bool | None = None
    """Whether every sample has its caption, an empty one where there is none; None: if the first images have any."""


@dataclass(frozen=True)
class Failure:
    """An image that was skipped."""

    source: str
    reason: str
    label: int
    rendition: str | None = None
    """The resize rule that it cannot have; None if the image itself cannot be used."""


@dataclass(frozen=True)
class About:
    """What one sample is: an image resized by one rule."""

    item: ImageItem
    rendition: str
    image_size: tuple[int, int]
    """(height, width) of the file, upright."""
    jpeg: bytes | None


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample on its way to the codec."""

    about: About
    pixels: np.ndarray
    """(H, W, 3) uint8."""

    @property
    def area(self) -> int:
        return self.pixels.shape[0] * self.pixels.shape[1]


Prepared: TypeAlias = list[Sample | Failure | None]
"""Of one image, rule by rule. None: the failure of the image as a whole is told at its first rule."""


@dataclass(frozen=True, eq=False)
class Preparation:
    """How an image file becomes pixels."""

    config: EncodeConfig
    rules: tuple[Rule, ...]
    multiple: int
    """Pixels that all sides are multiples of."""
    clock: Clock

    def __call__(self, item: ImageItem) -> Prepared:
        """Read and decode one image, and resize it by every rule. UserError if its source fails."""
        try:
            with self.clock.busy("read"):
                data = item.read()
            with self.clock.busy("decode"):
                image = decode_image(data, self.config.max_input_pixels)
        except (UnreadableImage, OversizedImage, OSError) as error:
            if isinstance(error, UserError) and not isinstance(error, FileNotFoundError):
                raise  # it is the store that fails, not this image
            reason = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
            return [Failure(item.name, readable(reason), item.label), *[None] * (len(self.rules) - 1)]
        return [self.resize(image, item, rule, name) for rule, name in zip(self.rules, self.config.resize, strict=True)]

    def resize(self, image: Image.Image, item: ImageItem, rule: Rule, name: str) -> Sample | Failure:
        """The image resized by one rule."""
        width, height = image.size
        ratio = max(width, height) / min(width, height)
        if ratio > self.config.max_aspect_ratio:
            limit = f"encode.max_aspect_ratio={self.config.max_aspect_ratio:g}"
            reason = f"{height} x {width} pixels: aspect ratio {ratio:.0f} is beyond {limit}"
            return Failure(item.name, reason, item.label, name)
        target = rule.target(height, width, self.multiple, self.config.max_tokens, item.key)
        tokens = target.final[0] * target.final[1] // self.multiple**2
        if tokens > self.config.max_tokens:  # a side of less than one multiple was stretched to one
            reason = f"{height} x {width} pixels: {tokens} tokens exceed encode.max_tokens={self.config.max_tokens}"
            return Failure(item.name, reason, item.label, name)
        with self.clock.busy("resize"):
            resized = apply(image, target)
            pixels = np.asarray(resized)
        jpeg = None
        if self.config.jpeg:
            with self.clock.busy("jpeg"):
                resized.save(buffer := io.BytesIO(), "JPEG", quality=95, subsampling=0)
                jpeg = buffer.getvalue()
        return Sample(About(item, name, (height, width), jpeg), pixels)


def preparation(config: EncodeConfig, factor: int, clock: Clock) -> Preparation:
    """The preparation for a codec of this factor. UserError for a resize rule that is unknown or does not fit it."""
    rules, multiple = tuple(parse_rule(rule) for rule in config.resize), factor * config.patch_size
    for rule in rules:
        rule.target(multiple, multiple, multiple, config.max_tokens, "")
    return Preparation(config, rules, multiple, clock)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warnings of Pillow inside the block: what matters in them is an error, see `decode_image`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield
