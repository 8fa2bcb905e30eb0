"""What a packed sequence is: the tokens of many images, end to end, and where each image begins.

A pack holds N tokens of n images. Image i has a grid of (rows, columns) tokens, row-major, and occupies the tokens
cu_seqlens[i]:cu_seqlens[i+1]; these tokens are a segment and attend only to one another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking) for name in ("tokens", "labels", "weights")
        }
        return replace(self, layout=self.layout.to(device, non_blocking), **moved)

    def pin_memory(self) -> "PackedBatch":
        """The same pack in page-locked memory, from which copies to a GPU do not block. Called by the loader."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("tokens", "labels", "weights")}
        return replace(self, layout=self.layout.pin_memory(), **pinned)


def patchify(latent: Tensor, patch_size: int = 1) -> Tensor:
    """Latent (c, H, W) → tokens (H/p · W/p, c·p·p), row-major, features in the order (c p1 p2)."""
    return rearrange(latent, "c (h p1) (w p2) -> (h w) (c p1 p2)", p1=patch_size, p2=patch_size)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: int = 1) -> Tensor:
    """Tokens (rows · columns, c·p·p) → latent (c, rows · p, columns · p): the inverse of `patchify`."""
    rows, columns = grid
    return rearrange(tokens, "(h w) (c p1 p2) -> c (h p1) (w p2)", h=rows, w=columns, p1=patch_size, p2=patch_size)
