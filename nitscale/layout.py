"""What a packed sequence is: the tokens of many images, end to end, and where each image begins.

A pack holds N tokens of n images. Image i has a grid of (rows, columns) tokens, row-major, and occupies the tokens
cu_seqlens[i]:cu_seqlens[i+1]; these tokens are a segment and attend only to one another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

Grid = tuple[int, int]
"""Tokens of one image: (rows, columns)."""


@dataclass(frozen=True)
class PackLayout:
    """Which token belongs to which image, and where in it."""

    cu_seqlens: Tensor
    """(n + 1,) int32: the first token of each segment, and N."""
    max_seqlen: int
    """Tokens of the longest segment; on the host, so that attention kernels need no sync."""
    segment_ids: Tensor
    """(N,) int64: the segment of each token."""
    positions: Tensor
    """(N, 2) int64: (row, column) of each token in its grid."""
    grids: Tensor
    """(n, 2) int64: (rows, columns) of each segment."""
    lengths: tuple[int, ...]
    """Tokens of each segment, on the host."""

    @classmethod
    def from_grids(cls, grids: Sequence[Grid], device: torch.device | str | None = None) -> "PackLayout":
        """The layout of images of these (rows, columns), in this order. ValueError for an empty grid or none."""
        if not len(grids):
            raise ValueError("layout: a pack needs at least one image")
        if any(rows < 1 or columns < 1 for rows, columns in grids):
            raise ValueError(f"layout: grids must be at least 1 x 1 tokens, got {list(grids)}")
        lengths = tuple(int(rows) * int(columns) for rows, columns in grids)
        sizes = torch.tensor(lengths)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        segment_ids = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
        grid_table = torch.tensor([tuple(grid) for grid in grids], dtype=torch.int64)
        index_in_segment = torch.arange(int(starts[-1])) - starts[segment_ids]
        columns_of_token = grid_table[segment_ids, 1]
        positions = torch.stack([index_in_segment // columns_of_token, index_in_segment % columns_of_token], dim=1)
        layout = cls(starts.to(torch.int32), max(lengths), segment_ids, positions, grid_table, lengths)
        return layout.to(device) if device is not None else layout

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_segments(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackLayout":
        """The same layout with its tensors on `device`."""
        return replace(
            self,
            **{
                name: getattr(self, name).to(device, non_blocking=non_blocking)
                for name in ("cu_seqlens", "segment_ids", "positions", "grids")
            },
        )

    def pin_memory(self) -> "PackLayout":
        """The same layout in page-locked memory."""
        names = ("cu_seqlens", "segment_ids", "positions", "grids")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclass(frozen=True)
class PackedImages:
    """The pixels of a pack's images, in one piece of memory, because every tensor that leaves a loader process costs
    time."""

    pixels: Tensor
    """(3 x pixels of all images,) uint8: RGB, image after image, each (height, width, 3); mirrored where the latent is,
    black where it could not be read."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of each image in pixels, on the host."""

    def split(self) -> list[Tensor]:
        """Each image, (3, height, width) uint8: views."""
        parts = self.pixels.split([3 * height * width for height, width in self.sizes])
        return [part.view(*size, 3).permute(2, 0, 1) for part, size in zip(parts, self.sizes, strict=True)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedImages":
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedImages":
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class PackedBatch:
    """One pack of a step, as the loader hands it to the trainer: one micro-batch of one data-parallel rank."""

    tokens: Tensor
    """(N, F) in the dtype in which they are stored: clean latent tokens, features in the order (c p1 p2)."""
    labels: Tensor
    """(n,) int64: class of each image."""
    layout: PackLayout
    weights: Tensor
    """(n,) float32: loss weight of each image; 0 keeps the place of a sample that could not be read."""
    sample_ids: tuple[int, ...]
    """Index of each image in the dataset."""
    flips: tuple[bool, ...]
    """Whether the horizontally flipped latent was taken."""
    step: int
    pack: int
    """Position of this pack among the packs of its step: with `step`, the key of its noise."""
    data_wait_s: float = 0.0
    """Seconds that the trainer waited for this pack."""
    unreadable: tuple[tuple[int, str], ...] = ()
    """(sample id, reason) of each image that could not be read; its tokens are zero and its weight is 0."""
    images: PackedImages | None = None
    """The pixels that the latents are of, if the loader was asked for them."""
    features: Tensor | None = None
    """(N, Z) float16: an encoder's features of each token, if the loader was asked for those of the dataset."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        return replace(
            self,
            layout=self.layout.to(device, non_blocking),
            **{name: value.to(device, non_blocking=non_blocking) for name, value in self._arrays().items()},
        )

    def pin_memory(self) -> "PackedBatch":
        """The same pack in page-locked memory, from which copies to a GPU do not block. Called by the loader."""
        pinned = {name: value.pin_memory() for name, value in self._arrays().items()}
        return replace(self, layout=self.layout.pin_memory(), **pinned)

    def _arrays(self) -> dict[str, Any]:
        names = ("tokens", "labels", "weights", "images", "features")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def patchify(latent: Tensor, patch_size: int = 1) -> Tensor:
    """Latent (c, H, W) → tokens (H/p · W/p, c·p·p), row-major, features in the order (c p1 p2)."""
    return rearrange(latent, "c (h p1) (w p2) -> (h w) (c p1 p2)", p1=patch_size, p2=patch_size)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: int = 1) -> Tensor:
    """Tokens (rows · columns, c·p·p) → latent (c, rows · p, columns · p): the inverse of `patchify`."""
    rows, columns = grid
    return rearrange(tokens, "(h w) (c p1 p2) -> c (h p1) (w p2)", h=rows, w=columns, p1=patch_size, p2=patch_size)
