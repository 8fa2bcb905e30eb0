"""`nitscale data verify`: is every byte of a dataset what its manifest and its indices say?"""

import hashlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nitscale.data.index import index_tar, read_arrays
from nitscale.data.manifest import Manifest, read_manifest
from nitscale.data.storage import Storage, open_storage
from nitscale.errors import UserError

SHOWN = 20
"""Problems that are told one by one."""


def verify_dataset(prefix: str | Path, workers: int = 8, progress: bool = True) -> str:
    """Check sizes and sha256 of every shard and index, and every sample's place, shape and crc32c against its index.

    Shards of an object store are brought to the folder for temporary files one by one, `workers` at a time. Returns a
    line for people, with objects that no manifest names; UserError that lists what is wrong.
    """
    storage = open_storage(prefix)
    manifest = read_manifest(storage)
    problems: list[str] = []
    bar = tqdm(total=len(manifest.shards), desc="verify", unit="shard", disable=None if progress else True)
    with bar, ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        for found in pool.map(lambda shard: shard_problems(storage, manifest, shard), manifest.shards):
            problems += found
            bar.update()
    if problems:
        shown = [*problems[:SHOWN], *([f"… and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else [])]
        raise UserError(
            f"verify: {len(problems):,} things are wrong with {prefix}:\n  " + "\n  ".join(shown) + "\ncopy these "
            "objects again; of a dataset that was encoded here, delete them and run the same encode again"
        )
    size = sum(shard["bytes"] for shard in manifest.shards)
    words = f"verify: {prefix} is whole: {manifest.samples:,} samples, {len(manifest.shards):,} shards, {size:,} bytes"
    strangers = objects_without_name(storage, manifest)
    if strangers:
        words += f"\n{len(strangers):,} objects that the manifest does not name, such as {strangers[0]}"
    return words


def shard_problems(storage: Storage, manifest: Manifest, shard: dict[str, Any]) -> list[str]:
    """What is wrong with a shard and its index."""
    try:
        with at_hand(storage, shard) as path:
            if (size := path.stat().st_size) != shard["bytes"]:
                return [f"{shard['tar']} has {size:,} bytes instead of {shard['bytes']:,}"]
            with open(path, "rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]
            problems = [] if whole else [f"{shard['tar']}: its sha256 differs from the manifest's"]
            return problems + index_problems(storage.read(shard["index"]), path, manifest, shard)
    except OSError as error:
        return [f"{shard['tar']} or its index cannot be read: {error}"]


def index_problems(data: bytes, path: Path, manifest: Manifest, shard: dict[str, Any]) -> list[str]:
    """How an index differs from its hash, and from what the shard at `path` holds."""
    name = shard["index"]
    problems = []
    if hashlib.sha256(data).hexdigest() != shard["index_sha256"]:
        problems.append(f"{name}: its sha256 differs from the manifest's")
    try:
        found, kind = index_tar(path, lambda texts: (0, 0), manifest.latent_suffixes)
        said = read_arrays(data, found)
    except (ValueError, KeyError, OSError) as error:
        return [*problems, f"{shard['tar']} or {name} is damaged: {error}"]
    if kind != (manifest.dtype, manifest.variants, manifest.channels):
        problems.append(
            f"{shard['tar']} holds {kind}, the manifest says {manifest.dtype}, {manifest.channels} channels"
        )
    for column in found.keys() - {"label", "rendition"}:
        if said[column].shape != found[column].shape:
            problems.append(f"{name}: {column} has {len(said[column]):,} entries for {len(found[column]):,} samples")
        elif len(wrong := np.flatnonzero((said[column] != found[column]).reshape(len(found[column]), -1).any(axis=1))):
            key = bytes(found["keys"][wrong[0]]).decode(errors="replace")
            problems.append(f"{name}: {column} of {len(wrong):,} samples is not that of the shard, such as {key!r}")
    return problems


@contextmanager
def at_hand(storage: Storage, shard: dict[str, Any]) -> Iterator[Path]:
    """The shard as a local file, for the length of the block."""
    if "://" not in storage.prefix:
        yield Path(storage.prefix, shard["tar"])
        return
    with tempfile.TemporaryDirectory(prefix="nitscale-verify-") as folder:
        path = Path(folder, "shard.tar")
        storage.download(shard["tar"], path, shard["bytes"])
        yield path


def objects_without_name(storage: Storage, manifest: Manifest) -> list[str]:
    """Objects beside the shards and indices that the manifest does not name."""
    named = {shard[kind] for shard in manifest.shards for kind in ("tar", "index")}
    folders = {name.rpartition("/")[0] for name in named} - {""}
    return [name for folder in sorted(folders) for name in storage.list(folder) if name not in named]
