"""A dataset that is nothing but image sizes, to plan a training before anything is encoded."""

from pathlib import Path

import numpy as np

from data_prep.resize import native_size
from nitscale.data.index import DatasetIndex
from nitscale.data.manifest import Dataset, Manifest
from nitscale.data.storage import open_storage
from nitscale.errors import UserError
from nitscale.randomness import permutation

SHARD_SAMPLES = 2048


def sizes_dataset(table: Path, images: int | None = None, factor: int = 32, max_tokens: int = 4096) -> Dataset:
    """The dataset that encoding images of these sizes by the `native` rule would give, without its latents.

    `table` is a CSV file with columns width, height, count in pixels; with `images`, the counts are scaled to that many
    images in all. The images are shuffled over shards of SHARD_SAMPLES. UserError if the table cannot be read.
    """
    widths, heights, counts = read_sizes(table)
    grids = np.array(
        [native_size(h, w, factor, factor * max_tokens**0.5) for h, w in zip(heights, widths, strict=True)]
    )
    kinds = np.repeat(np.arange(len(counts)), apportion(counts, images or int(counts.sum())))
    kinds = kinds[permutation(len(kinds), "sizes")]
    rows, columns = (grids[kinds] // factor).astype(np.int32).T.copy()
    starts = np.append(np.arange(0, len(kinds), SHARD_SAMPLES), len(kinds))
    nothing = np.broadcast_to(np.int64(0), len(kinds))
    names = tuple(f"{number:06d}" for number in range(len(starts) - 1))
    index = DatasetIndex(
        names, starts, nothing, rows, columns, nothing, nothing, nothing[:, None], {}, names, open_storage(table.parent)
    )
    manifest = Manifest(
        codec={"id": "none", "factor": factor, "channels": 1},
        dtype="bfloat16",
        flips=True,
        classes=["image"],
        samples=len(kinds),
        tokens=int((rows.astype(np.int64) * columns).sum()),
        grids={},
        shards=[{"tar": name, "samples": int(size)} for name, size in zip(names, np.diff(starts), strict=True)],
    )
    return Dataset(manifest, index, open_storage(table.parent))


def read_sizes(table: Path) -> np.ndarray:
    """Widths, heights and counts, (3, kinds) int64. UserError if `table` is not such a file."""
    example = "give a CSV file with a line `width,height,count` and numbers below it"
    try:
        lines = table.read_text().split()
        columns = [name.strip().lower() for name in lines[0].split(",")]
        numbers = np.array([line.split(",") for line in lines[1:]], dtype=np.int64)
        found = numbers[:, [columns.index(name) for name in ("width", "height", "count")]].T
    except OSError as error:
        raise UserError(f"sizes: cannot read {table}: {error.strerror}; {example}") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"sizes: {table} is not a table of sizes ({error}); {example}") from error
    if found[:2].min(initial=1) < 1 or found[2].min(initial=0) < 0 or found[2].sum() < 1:
        raise UserError(f"sizes: {table} has a size below one pixel, a negative count or no image; {example}")
    return found


def apportion(counts: np.ndarray, total: int) -> np.ndarray:
    """`counts` scaled to integers that sum to `total`, each within one of its share (largest remainders)."""
    shares = counts * (total / counts.sum())
    scaled = np.floor(shares).astype(np.int64)
    scaled[np.argsort(scaled - shares, kind="stable")[: total - scaled.sum()]] += 1
    return scaled
