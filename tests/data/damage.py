"""Harm done to a data set by the tests."""

from pathlib import Path

from nitscale.data.manifest import Dataset


def damage(folder: Path, dataset: Dataset, sample_id: int) -> None:
    """Flip a bit in each variant of a sample's latent."""
    ref = dataset.index.ref(sample_id)
    data = bytearray((folder / ref.shard).read_bytes())
    size = dataset.manifest.bytes_per_cell * ref.grid[0] * ref.grid[1]
    for variant in range(dataset.manifest.variants):
        data[ref.offset + (variant + 1) * size - 1] ^= 1
    (folder / ref.shard).write_bytes(data)
