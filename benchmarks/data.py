"""The data engine in numbers, one table each: packers, time of a plan, the loader beside plain webdataset iteration.

    python benchmarks/data.py --sizes SIZES.csv              packers and plans on real image sizes
    python benchmarks/data.py --sizes SIZES.csv --only loader --core 0

SIZES.csv has columns width, height, count; the latents of the loader's part are made by this script, bf16 f32c32.
`benchmarks/encode.py` measures the stages of encoding.
"""

import argparse
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset
from safetensors.torch import load as load_safetensors

from data_prep.sizes import sizes_dataset
from nitscale.data.forecast import forecast
from nitscale.data.index import index_bytes, index_shard
from nitscale.data.loader import PackLoader
from nitscale.data.manifest import MANIFEST, Dataset, Manifest, load_dataset
from nitscale.data.plan import Plan, PlanConfig
from nitscale.data.shards import ShardWriter

TOKEN_BUDGET = 16384
CHANNELS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=Path, required=True, help="CSV file with columns width, height, count")
    parser.add_argument("--images", type=int, default=1_280_000, help="images of the plans (1,280,000)")
    parser.add_argument("--many", type=int, default=11_200_000, help="images of the large plan (11,200,000)")
    parser.add_argument("--samples", type=int, default=16_384, help="samples of the loader's data set (16,384)")
    parser.add_argument("--only", choices=["plan", "loader"], help="one part alone")
    parser.add_argument("--core", type=int, help="keep to this core; the loader's worker shares it with the trainer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    print(machine())
    if options.only != "loader":
        print_plans(options.sizes, options.images, options.many)
    if options.only != "plan":
        with tempfile.TemporaryDirectory() as folder:
            print_loader(make_latents(Path(folder), sizes_dataset(options.sizes, options.samples)))


def print_plans(sizes: Path, images: int, many: int) -> None:
    """Fill, balance, mixture and time of an epoch for both packers."""
    print(f"\n{'packer':9} {'images':>11} {'ranks':>5} {'packs':>5} {'lanes':>5}  "
          f"{'fill':>7} {'imbalance':>9} {'entropy':>7} {'seconds':>7}")  # fmt: skip
    print(f"{'':9} {'':>11} {'':>5} {'/rank':>5}")
    small = sizes_dataset(sizes, images)
    cases = [
        (small, packer, ranks, packs, lanes)
        for ranks, packs, lanes in ((64, 1, 1), (64, 1, 64), (512, 1, 1), (512, 1, 64), (64, 4, 1), (512, 4, 1))
        for packer in ("lpfhp", "balanced")
    ]
    large = sizes_dataset(sizes, many)
    cases += [(large, "lpfhp", 512, 1, 64), (large, "balanced", 512, 1, 64)]
    for dataset, packer, ranks, packs, lanes in cases:
        config = PlanConfig(0, TOKEN_BUDGET, ranks * packs, lanes, packer=packer)
        report = forecast(dataset, config, ranks)
        print(
            f"{packer:9} {report['images']:11,} {ranks:5} {packs:5} {lanes:5}  {report['fill']:7.3%} "
            f"{report['imbalance']:9.4f} {report['entropy']:7.3f} {report['seconds']:7.2f}",
            flush=True,
        )


def print_loader(dataset: Dataset) -> None:
    """Tokens a second of the loader, and of a plain walk through the same shards with webdataset, in turns."""
    readers = {
        "nitscale, in the trainer": lambda: packs(dataset, workers=0),
        "nitscale, 1 worker": lambda: packs(dataset, workers=1),
        "webdataset, in the trainer": lambda: plain(dataset, workers=0),
        "webdataset, 1 worker": lambda: plain(dataset, workers=1),
    }
    tokens = dataset.manifest.tokens
    best = dict.fromkeys(readers, float("inf"))
    for _ in range(3):
        for name, reader in readers.items():
            best[name] = min(best[name], seconds_of(reader(), tokens))
    print(f"\nloader, {dataset.manifest.samples:,} samples of bf16 f32c32 latents, {tokens:,} tokens; best of 3 turns")
    for name, seconds in best.items():
        print(f"{name:28} {tokens / seconds / 1e6:6.2f} M tokens/s")


def seconds_of(token_counts: Iterator[int], tokens: int) -> float:
    """Seconds until `tokens` tokens have come, from the first item on: starting a worker does not count."""
    next(token_counts)
    began, count = time.perf_counter(), 0
    while count < tokens:
        count += next(token_counts)
    return time.perf_counter() - began


def packs(dataset: Dataset, workers: int) -> Iterator[int]:
    """Tokens of each pack: checked, packed in a plan's order, with their layout."""
    plan = Plan(dataset, PlanConfig(0, TOKEN_BUDGET, 8))
    for batch in PackLoader(dataset, plan, plan.start(), workers=workers):
        yield batch.layout.num_tokens


def plain(dataset: Dataset, workers: int) -> Iterator[int]:
    """Tokens of each image: read by webdataset in the order of the shards, unchecked and unpacked."""
    shards = [f"{dataset.storage.prefix}/{shard}" for shard in dataset.index.shards]
    images = webdataset.WebDataset(shards, shardshuffle=False).repeat().map(plain_latent)
    if workers:
        images = webdataset.WebLoader(images, batch_size=None, num_workers=workers)
    for latent in images:
        yield latent.shape[1] * latent.shape[2]


def plain_latent(sample: dict[str, bytes]) -> torch.Tensor:
    return load_safetensors(sample["latent.safetensors"])["latent"][0]


def make_latents(folder: Path, sizes: Dataset) -> Dataset:
    """A data set of latents of noise with these sizes, in shards of 1,024 samples."""
    noise = torch.randn(2 * CHANNELS * int((sizes.index.rows * sizes.index.columns).max())).bfloat16()
    grids = torch.stack([torch.from_numpy(sizes.index.rows), torch.from_numpy(sizes.index.columns)], dim=1).tolist()
    shards = []
    for name in ("shards", "index"):
        (folder / name).mkdir()
    for start in range(0, len(grids), 1024):
        tar, index = f"shards/{start:08d}.tar", f"index/{start:08d}.npz"
        with open(folder / tar, "wb") as file, ShardWriter(file) as writer:
            for i, (rows, columns) in enumerate(grids[start : start + 1024]):
                latents = noise[: 2 * CHANNELS * rows * columns].reshape(2, CHANNELS, rows, columns)
                writer.add(f"{start + i:08d}", latents, {"label": 0, "rendition": "native"})
        arrays = index_shard(folder / tar, ["native"])
        (folder / index).write_bytes(index_bytes(arrays))
        sha256 = {key: hashlib.sha256((folder / path).read_bytes()).hexdigest()
                  for key, path in (("sha256", tar), ("index_sha256", index))}  # fmt: skip
        size = (folder / tar).stat().st_size
        shards.append({"tar": tar, "index": index, "samples": len(arrays["keys"]), "bytes": size, **sha256})
    manifest = Manifest(
        {"id": "noise", "factor": 32, "channels": CHANNELS}, "bfloat16", True, ["image"], len(grids),
        sizes.manifest.tokens, {}, shards,
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json())
    return load_dataset(folder)


def machine() -> str:
    """The machine and the versions, in a line."""
    cpu = platform.processor() or platform.machine()
    if shutil.which("lscpu"):
        lines = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("Model name")), cpu)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "webdataset"))
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}; Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
