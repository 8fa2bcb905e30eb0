"""Harm done to a data set by the tests."""

from pathlib import Path

import numpy as np

from nitscale.data.manifest import Dataset


def damage(folder: Path, dataset: Dataset, sample_id: int) -> None:
    """Flip a bit in each variant of a sample's latent."""
    ref = dataset.index.ref(sample_id)
    data = bytearray((folder / ref.shard).read_bytes())
    size = dataset.manifest.bytes_per_cell * ref.grid[0] * ref.grid[1]
    for variant in range(dataset.manifest.variants):
        data[ref.offset + (variant + 1) * size - 1] ^= 1
    (folder / ref.shard).write_bytes(data)


def damage_member(folder: Path, dataset: Dataset, member: str, sample_id: int, flipped: bool = False) -> None:
    """Flip a bit in the middle of an optional member of a sample, or of one variant of it."""
    (ref,) = dataset.index.member_refs(member, np.array([sample_id]), np.array([flipped]))
    data = bytearray((folder / ref.shard).read_bytes())
    data[ref.offset + ref.length // 2] ^= 1
    (folder / ref.shard).write_bytes(data)
