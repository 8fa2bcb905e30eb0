"""From image files to latents: decode and resize in threads, batch equal sizes, encode with their mirror images.

Results come out in the order of the input, and batches depend on that order alone, never on timing: the same images
give the same bytes. Memory is bounded by a window of pixels, whatever the images' sizes.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from data_prep.folders import ImageSource
from data_prep.images import UnreadableImage, decode_image
from data_prep.resize import native_size, resize
from nitscale.autoencoders import Codec, DCTCodec
from nitscale.errors import UserError

WINDOW_PIXELS = 2**25
"""Pixels of the images among which equal sizes are sought: 96 MiB of 8-bit RGB."""
WINDOW_IMAGES = 1024
BATCH_PIXELS = 2**22
"""Pixels of one batch of the codec, mirror images apart."""


@dataclass(frozen=True)
class EncodeConfig:
    """What a dataset is encoded to. Another value of any field makes another dataset."""

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
    """Images of one shard."""
    fit_images: int = 512
    """Images from which the DCT codec takes the mean and standard deviation of each channel."""


@dataclass(frozen=True)
class Failure:
    """An image that was skipped."""

    source: str
    reason: str


@dataclass(frozen=True, eq=False)
class Prepared:
    """A decoded and resized image."""

    source: ImageSource
    pixels: np.ndarray
    """(H, W, 3) uint8."""
    image_size: tuple[int, int]
    """(height, width) of the file."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image's latents."""

    source: ImageSource
    latents: Tensor
    """(2, c, h, w) float16: of the image and of its mirror image."""
    image_size: tuple[int, int]
    """(height, width) of the file."""


def encode_images(
    sources: Iterable[ImageSource],
    codec: Codec,
    config: EncodeConfig,
    pool: ThreadPoolExecutor,
    device: torch.device | str,
) -> Iterator[EncodedImage | Failure]:
    """Encode images with `codec` (on `device`), one result an image, in order."""
    window: list[Prepared | Failure] = []
    pixels = 0
    for item in prepare_images(sources, codec.factor, config, pool):
        window.append(item)
        pixels += item.pixels[..., 0].size if isinstance(item, Prepared) else 0
        if pixels >= WINDOW_PIXELS or len(window) == WINDOW_IMAGES:
            yield from encode_window(window, codec, device)
            window, pixels = [], 0
    yield from encode_window(window, codec, device)


def prepare_images(
    sources: Iterable[ImageSource], factor: int, config: EncodeConfig, pool: ThreadPoolExecutor
) -> Iterator[Prepared | Failure]:
    """Decode and resize in the pool's threads, a few images ahead, in order."""
    ahead: deque[Future[Prepared | Failure]] = deque()
    try:
        for source in sources:
            ahead.append(pool.submit(prepare_image, source, factor, config))
            if len(ahead) >= 64:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def prepare_image(source: ImageSource, factor: int, config: EncodeConfig) -> Prepared | Failure:
    """Decode one image and bring it to its native size, or say why not."""
    try:
        image = decode_image(source.path, config.max_input_pixels)
    except UnreadableImage as error:
        return Failure(source.name, str(error))
    width, height = image.size
    ratio = max(width, height) / min(width, height)
    if ratio > config.max_aspect_ratio:
        limit = f"encode.max_aspect_ratio={config.max_aspect_ratio:g}"
        return Failure(source.name, f"{height} x {width} pixels: aspect ratio {ratio:.0f} is beyond {limit}")
    multiple = factor * config.patch_size
    size = native_size(height, width, multiple, multiple * config.max_tokens**0.5)
    tokens = size[0] * size[1] // multiple**2
    if tokens > config.max_tokens:  # a side of less than one multiple was stretched to one
        return Failure(
            source.name, f"{height} x {width} pixels: {tokens} tokens exceed encode.max_tokens={config.max_tokens}"
        )
    return Prepared(source, np.asarray(resize(image, size)), (height, width))


def encode_window(
    window: list[Prepared | Failure], codec: Codec, device: torch.device | str
) -> Iterator[EncodedImage | Failure]:
    """Encode the images of a window in batches of equal size, and give them back in its order."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for position, item in enumerate(window):
        if isinstance(item, Prepared):
            by_size.setdefault(item.pixels.shape, []).append(position)
    results: dict[int, EncodedImage | Failure] = {
        position: item for position, item in enumerate(window) if isinstance(item, Failure)
    }
    for (height, width, _), positions in by_size.items():
        per_batch = max(1, BATCH_PIXELS // (height * width))
        for start in range(0, len(positions), per_batch):
            chosen = positions[start : start + per_batch]
            items = [item for item in (window[i] for i in chosen) if isinstance(item, Prepared)]
            latents = encode_batch(np.stack([item.pixels for item in items]), codec, device)
            for position, item, pair in zip(chosen, items, latents, strict=True):
                if pair.isfinite().all():
                    results[position] = EncodedImage(item.source, pair, item.image_size)
                else:
                    results[position] = Failure(item.source.name, "its latent is not finite in float16")
    yield from (results[position] for position in range(len(window)))


@torch.inference_mode()
def encode_batch(pixels: np.ndarray, codec: Codec, device: torch.device | str) -> Tensor:
    """Images (b, H, W, 3) uint8 → latents (b, 2, c, h, w) float16 of the images and of their mirror images."""
    images = to_float(torch.from_numpy(pixels).to(device))
    latents = codec.encode(torch.cat([images, images.flip(-1)]))
    return rearrange(latents.half().cpu(), "(two b) c h w -> b two c h w", two=2)


def to_float(pixels: Tensor) -> Tensor:
    """Images (b, H, W, 3) uint8 → (b, 3, H, W) float32 in [-1, 1]."""
    return rearrange(pixels, "b h w c -> b c h w").float() / 127.5 - 1


def fit_dct(sources: Iterable[ImageSource], config: EncodeConfig, pool: ThreadPoolExecutor) -> DCTCodec:
    """The DCT codec of the config, standardised on the first readable ones of `sources`. UserError if there is none."""
    failures: list[Failure] = []

    def readable() -> Iterator[Tensor]:
        for item in prepare_images(sources, config.factor, config, pool):
            if isinstance(item, Prepared):
                yield to_float(torch.from_numpy(item.pixels[None].copy()))
            else:
                failures.append(item)

    images = readable()
    codec = DCTCodec(config.factor, config.channels)
    if (first := next(images, None)) is None:
        reasons = "; ".join(f"{failure.source}: {failure.reason}" for failure in failures[:3])
        raise UserError(f"encode: none of the {len(failures):,} images can be used ({reasons})")
    return codec.fit(chain([first], islice(images, config.fit_images - 1)))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let PyTorch compute on one CPU thread inside the block.

    The decoding threads fill the cores already; OpenMP threads that spin for one another took seven times as long on
    5,000 small images (2 cores). It also makes the latents' last bits independent of the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
