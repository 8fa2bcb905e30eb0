"""The DCT codec, which needs no weights: an orthonormal block DCT in YCbCr that keeps the lowest frequencies, as JPEG
does. See `nitscale.autoencoders` for what a codec is."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from nitscale.errors import UserError

CHROMA_STRIDE = 4
"""Luma coefficients kept for each coefficient of Cb and of Cr: JPEG's 4:2:0, half the resolution on either side."""
SMALLEST_STD = 0.01
"""Floor of a channel's standard deviation: just above the quantisation noise of 8-bit images, so that the chroma
channels of grey images are not blown up."""
# Rows Y, Cb, Cr of ITU-R BT.601 as JFIF uses it, for columns R, G, B centred on zero.
YCBCR_FROM_RGB = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.886 / 1.772],
        [0.701 / 1.402, -0.587 / 1.402, -0.114 / 1.402],
    ]
)


class DCTCodec(nn.Module):
    """Block DCT of `factor` × `factor` pixels in YCbCr that keeps `channels` low-frequency coefficients.

    Which ones: luma coefficients in JPEG's zig-zag order, and after every fourth the next of Cb and of Cr, until there
    are `channels` (32 channels: 21 of Y, 6 of Cb, 5 of Cr). With channels = 3 · factor² all are kept and the codec is
    exactly invertible, up to floating-point rounding. `mean` and `std` (channels,) standardise; see `fit`.
    """

    analysis: Tensor
    synthesis: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        factor: int = 16,
        channels: int = 32,
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
    ) -> None:
        """UserError if `channels` is not in 1..3 · factor², or `mean` and `std` do not have that many finite values."""
        super().__init__()
        if factor < 1 or not 1 <= channels <= 3 * factor**2:
            raise UserError(
                f"autoencoders: the DCT codec has 1 to 3 x factor² = {3 * max(factor, 0) ** 2} channels at "
                f"factor={factor}, got channels={channels}"
            )
        self.factor, self.channels = factor, channels
        analysis, synthesis = dct_matrices(factor, channels)
        self.register_buffer("analysis", analysis, persistent=False)
        self.register_buffer("synthesis", synthesis, persistent=False)
        for name, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            numbers = [default] * channels if values is None else [float(value) for value in values]
            if len(numbers) != channels or not np.isfinite(numbers).all() or (name == "std" and min(numbers) <= 0):
                raise UserError(f"autoencoders: the DCT codec needs {channels} finite values of {name}, got {numbers}")
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float64).float(), persistent=False)

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor]) -> "DCTCodec":
        """The same codec, standardised on `images`, each (3, H, W) or (b, 3, H, W) in [-1, 1].

        The statistics are rounded to six digits, so that they read well in a manifest. UserError for no images.
        """
        count, total, squares = 0, torch.zeros(self.channels).double(), torch.zeros(self.channels).double()
        for image in images:
            batch = image if image.ndim == 4 else image[None]
            coefficients = rearrange(self._coefficients(batch).double().cpu(), "b h w c -> (b h w) c")
            count += len(coefficients)
            total += coefficients.sum(0)
            squares += coefficients.square().sum(0)
        if not count:
            raise UserError("autoencoders: no images to fit the DCT codec to")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=SMALLEST_STD)
        rounded = [[float(f"{value:.6g}") for value in values.tolist()] for values in (mean, std)]
        return DCTCodec(self.factor, self.channels, *rounded).to(self.mean.device)

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] → latents (b, channels, H / factor, W / factor) float32.

        ValueError if a side is not a multiple of `factor`.
        """
        return rearrange((self._coefficients(images) - self.mean) / self.std, "b h w c -> b c h w").contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, channels, h, w) → images (b, 3, h · factor, w · factor) float32; dropped frequencies are zero."""
        coefficients = rearrange(latents.float(), "b c h w -> b h w c") * self.std + self.mean
        blocks = coefficients @ self.synthesis
        return rearrange(blocks, "b h w (c p q) -> b c (h p) (w q)", p=self.factor, q=self.factor)

    def spec(self) -> dict[str, Any]:
        parameters = {
            "id": "dct",
            "factor": self.factor,
            "channels": self.channels,
            "mean": [float(f"{value:.6g}") for value in self.mean.tolist()],
            "std": [float(f"{value:.6g}") for value in self.std.tolist()],
        }
        canonical = json.dumps(parameters, sort_keys=True, separators=(",", ":"))
        return parameters | {"digest": hashlib.sha256(canonical.encode()).hexdigest()}

    def _coefficients(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) → unstandardised coefficients (b, h, w, channels) float32."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(
                f"autoencoders: expected images (b, 3, H, W) with H and W multiples of {self.factor}, "
                f"got {tuple(images.shape)}"
            )
        blocks = rearrange(images.float(), "b c (h p) (w q) -> b h w (c p q)", p=self.factor, q=self.factor)
        return blocks @ self.analysis


def dct_from_spec(spec: dict[str, Any]) -> DCTCodec:
    """The codec that a manifest describes. UserError if the description is damaged or its digest does not match."""
    try:
        codec = DCTCodec(spec["factor"], spec["channels"], spec["mean"], spec["std"])
    except (KeyError, TypeError) as error:
        raise UserError(f"autoencoders: the codec's description is damaged ({error!r}): {spec}") from error
    if codec.spec()["digest"] != spec.get("digest"):
        raise UserError(
            f"autoencoders: the codec's parameters do not match their digest {spec.get('digest')!r}; "
            "the manifest was edited or damaged: encode the images again"
        )
    return codec


def dct_matrices(factor: int, channels: int) -> tuple[Tensor, Tensor]:
    """Analysis (3 · factor², channels) and synthesis (channels, 3 · factor²); pixels are in the order (rgb y x)."""
    y_or_x, frequency = np.arange(factor), np.arange(factor)[:, None]
    dct = np.sqrt(2 / factor) * np.cos(np.pi * (2 * y_or_x + 1) * frequency / (2 * factor))
    dct[0] /= np.sqrt(2)
    component, u, v = np.array(kept_coefficients(factor, channels)).T
    blocks = dct[u][:, :, None] * dct[v][:, None, :]  # (channels, y, x)
    analysis = np.einsum("cr,cyx->ryxc", YCBCR_FROM_RGB[component], blocks).reshape(-1, channels)
    synthesis = np.einsum("rc,cyx->cryx", np.linalg.inv(YCBCR_FROM_RGB)[:, component], blocks).reshape(channels, -1)
    return torch.from_numpy(analysis).float(), torch.from_numpy(synthesis).float()


def kept_coefficients(factor: int, channels: int) -> list[tuple[int, int, int]]:
    """The first `channels` of all (component, vertical, horizontal frequency); components 0, 1, 2 are Y, Cb, Cr."""
    zigzag = sorted(
        ((u, v) for u in range(factor) for v in range(factor)),
        key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else uv[1]),
    )
    ranked = [
        (rank * (CHROMA_STRIDE if component else 1), component, u, v)
        for rank, (u, v) in enumerate(zigzag)
        for component in range(3)
    ]
    return [(component, u, v) for _, component, u, v in sorted(ranked)[:channels]]
