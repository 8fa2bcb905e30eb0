"""Batches of pixels → latents on a device, mirror images too.

On a GPU nothing waits for anything it does not need: pixels come from page-locked memory, latents go back to it, and
the next batch is launched before the last one is asked for. A batch that does not fit into memory is halved, and so are
the later ones of its size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from nitscale.autoencoders import Codec
from nitscale.data.shards import LATENT_DTYPES

Latents: TypeAlias = tuple[Tensor, Tensor]
"""(b, v, c, h, w) latents and (b,) bool, whether all their numbers are finite; on the CPU."""
Pending: TypeAlias = Callable[[], Latents | None]
"""Waits for latents; None if not even one image fits into memory."""


@dataclass(eq=False)
class Encoder:
    """A codec on a device."""

    codec: Codec
    device: torch.device
    dtype: str = "float16"
    """Of the latents: a name in LATENT_DTYPES."""
    flips: bool = True
    largest: int | None = None
    """Pixels of the largest batch that may fit into memory, once one did not."""

    def stack(self, images: list[np.ndarray]) -> Tensor:
        """Images (H, W, 3) uint8 of one size → (b, H, W, 3), in page-locked memory for a GPU."""
        stacked = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=self.on_gpu)
        np.stack(images, out=stacked.numpy())
        return stacked

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def launch(self, pixels: Tensor) -> list[tuple[int, Pending]]:
        """Begin to encode a batch (b, H, W, 3): how many images, and their latents when they are asked for; several
        such parts in order if the batch is too large for the memory."""
        if self.largest is not None:
            most = max(1, self.largest // pixels[0, ..., 0].numel())
            if len(pixels) > most:
                return [part for few in pixels.split(most) for part in self.launch(few)]
        try:
            return [(len(pixels), self._launch(pixels))]
        except torch.OutOfMemoryError:
            pass  # and on below: the traceback holds on to tensors
        if self.on_gpu:
            torch.cuda.empty_cache()
        if len(pixels) == 1:
            return [(1, self._launch_alone(pixels))]
        self.largest = pixels[..., 0].numel() // 2
        return self.launch(pixels)

    @torch.inference_mode()
    def _launch(self, pixels: Tensor) -> Pending:
        images = to_float(pixels.to(self.device, non_blocking=True))
        latents = self.codec.encode(torch.cat([images, images.flip(-1)]) if self.flips else images)
        return self._fetch(rearrange(latents, "(v b) c h w -> b v c h w", b=len(pixels)))

    @torch.inference_mode()
    def _launch_alone(self, pixels: Tensor) -> Pending:
        """The image and its mirror image one after the other."""
        try:
            images = to_float(pixels.to(self.device))
            views = [images, images.flip(-1)] if self.flips else [images]
            return self._fetch(torch.stack([self.codec.encode(view) for view in views], dim=1))
        except torch.OutOfMemoryError:
            return lambda: None

    def _fetch(self, latents: Tensor) -> Pending:
        latents = latents.to(LATENT_DTYPES[self.dtype])
        finite = latents.isfinite().flatten(1).all(1)
        if not self.on_gpu:
            result = latents.contiguous(), finite
            return lambda: result
        fetched = tuple(
            torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
            for part in (latents, finite)
        )
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.device))

        def wait() -> Latents:
            arrived.synchronize()
            return fetched[0], fetched[1]

        return wait


def to_float(pixels: Tensor) -> Tensor:
    """Images (b, H, W, 3) uint8 → (b, 3, H, W) float32 in [-1, 1]."""
    return rearrange(pixels, "b h w c -> b c h w").float() / 127.5 - 1


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute on `count` CPU threads inside the block.

    One is best for the DCT codec: the decoding threads fill the cores already, and OpenMP threads that spin for one
    another took seven times as long on 5,000 small images (2 cores). Their number may change the latents' last bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
