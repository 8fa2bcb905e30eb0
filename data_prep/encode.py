"""`nitscale encode`: a folder of images → a dataset of latent shards.

The images are put in a fixed random order and cut into partitions, one a shard. A partition's shard, index and commit
marker (`commits/NNNNNN.json`) are written in this order, each atomically, and the manifest comes last: killed at any
point, the job continues with the first partition that has no marker and ends with the same bytes.
"""

import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from data_prep.folders import ImageFolder, ImageSource, find_images
from data_prep.pipeline import EncodeConfig, Failure, encode_images, fit_dct, one_torch_thread
from nitscale.autoencoders import Codec, codec_from_spec
from nitscale.data.index import index_bytes, index_shard
from nitscale.data.manifest import MANIFEST, Manifest
from nitscale.data.shards import ShardWriter
from nitscale.data.storage import Storage, open_storage
from nitscale.errors import UserError
from nitscale.randomness import permutation

RECIPE = "encode.json"
"""What the dataset is being made from, written first: a prefix never mixes two datasets."""
FAILURES = "failures.jsonl"
"""One line an image that was skipped, with the reason."""


Commit: TypeAlias = dict[str, Any]
"""A commit marker: name, samples, tokens, grids, failures; and bytes, sha256, index_sha256 where there is a shard."""


@dataclass(frozen=True)
class EncodeReport:
    """What an encode did."""

    output: str
    samples: int
    tokens: int
    """Latent cells of all samples: tokens at patch size 1."""
    shards: int
    reused_shards: int
    """Shards that an earlier run had finished."""
    failures: tuple[Failure, ...]
    ignored: dict[str, int]
    """Number of files that are no images, by their suffix."""
    seconds: float
    digest: str
    """Of the manifest: the dataset's version."""

    def summary(self) -> str:
        """The report in a few lines, with the first skipped images."""
        lines = [
            f"{self.samples:,} images, {self.tokens:,} latent cells in {self.shards} shards "
            f"({self.reused_shards} already there), {self.seconds:.1f} s: {self.output}"
        ]
        if self.failures:
            lines.append(f"{len(self.failures):,} images skipped, all listed in {self.output}/{FAILURES}:")
            lines += [f"  {failure.source}: {failure.reason}" for failure in self.failures[:5]]
        if self.ignored:
            lines.append("other files: " + ", ".join(f"{n} {suffix}" for suffix, n in self.ignored.items()))
        return "\n".join(lines)


def encode_folder(
    images: str | Path,
    output: str | Path,
    config: EncodeConfig | None = None,
    *,
    codec: Codec | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> EncodeReport:
    """Encode the folder `images` (see `find_images`) into a dataset at `output`, or finish one that was interrupted.

    Without `codec` it is the DCT codec of the config, standardised on the first images; with one, its factor and
    channels take the place of the config's. `workers` threads decode (default: one a core); they never change the
    result. Images that cannot be used are skipped, counted and listed in the report and in `failures.jsonl`.

    UserError if the folder is missing, empty or has an empty class, no image of a class can be read, `output` holds
    another dataset or an encode in progress, or the disk is full or read-only.
    """
    started = time.perf_counter()
    config = config or EncodeConfig()
    check_config(config)
    folder = find_images(images)
    storage = open_storage(output)
    if Path(output).resolve().is_relative_to(Path(images).resolve()):
        raise UserError(f"encode: the output {output} lies in the image folder {images}; choose another output")
    order = permutation(len(folder.images), "encode", "order")
    ordered = [folder.images[i] for i in order]
    workers = workers or len(os.sched_getaffinity(0))
    with (
        storage.exclusive("encoding into"),
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool,
        warnings.catch_warnings(),
        one_torch_thread(),
    ):
        warnings.filterwarnings("ignore", module="PIL")  # what matters becomes an error, see images.py
        try:
            codec = prepare_recipe(storage, folder, config, codec, ordered, pool)
            codec = codec.to(device)
            job = EncodeJob(storage, folder, config, codec, device, pool)
            commits, reused = job.run(ordered, progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        failures = tuple(sorted((Failure(**f) for c in commits for f in c["failures"]), key=lambda f: f.source))
        check_classes(folder, failures)
        if failures:
            lines = (json.dumps(asdict(failure), ensure_ascii=False) + "\n" for failure in failures)
            storage.write(FAILURES, "".join(lines).encode())
        manifest = build_manifest(commits, codec, folder.classes)
        storage.write(MANIFEST, manifest.to_json().encode())
    seconds = time.perf_counter() - started
    return EncodeReport(
        output=str(output),
        samples=manifest.samples,
        tokens=manifest.tokens,
        shards=len(manifest.shards),
        reused_shards=reused,
        failures=failures,
        ignored=folder.ignored,
        seconds=seconds,
        digest=manifest.digest,
    )


@dataclass(frozen=True, eq=False)
class EncodeJob:
    """Makes the shards that are missing."""

    storage: Storage
    folder: ImageFolder
    config: EncodeConfig
    codec: Codec
    device: torch.device | str
    pool: ThreadPoolExecutor

    def run(self, ordered: list[ImageSource], progress: bool) -> tuple[list[Commit], int]:
        """Make every partition that is not committed; the commits of all, and how many were there before."""
        size = self.config.shard_samples
        partitions = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        commits = [self.read_commit(f"{number:06d}") for number in range(len(partitions))]
        reused = sum(commit is not None for commit in commits)
        done = sum(len(part) for part, commit in zip(partitions, commits, strict=True) if commit)
        # disable=None: no bar where the output is no terminal
        bar = tqdm(total=len(ordered), initial=done, desc="encode", unit="image", disable=None if progress else True)
        with bar:
            for number, partition in enumerate(partitions):
                if commits[number] is None:
                    commits[number] = self.make_partition(f"{number:06d}", partition, bar)
        return [commit for commit in commits if commit is not None], reused

    def read_commit(self, name: str) -> Commit | None:
        """The partition's commit marker, or None if the partition has still to be made."""
        try:
            commit: Commit = json.loads(self.storage.read(f"commits/{name}.json"))
            if commit["samples"]:
                index = self.storage.read(f"index/{name}.npz")
                whole = self.storage.size(f"shards/{name}.tar") == commit["bytes"]
                if not whole or hashlib.sha256(index).hexdigest() != commit["index_sha256"]:
                    return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return commit

    def make_partition(self, name: str, sources: list[ImageSource], bar: tqdm) -> Commit:
        """Encode one partition and commit it: shard, then index, then marker."""
        commit: Commit = {"name": name, "samples": 0, "tokens": 0, "grids": {}, "failures": []}
        with suppress(NoReadableImage), self.storage.create(f"shards/{name}.tar") as path:
            self.write_shard(path, sources, commit, bar)
            arrays = index_shard(path, ["native"])
            with open(path, "rb") as file:
                commit["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            commit["bytes"] = path.stat().st_size
        if commit["samples"]:
            assert len(arrays["keys"]) == commit["samples"]
            index = index_bytes(arrays)
            commit["index_sha256"] = hashlib.sha256(index).hexdigest()
            self.storage.write(f"index/{name}.npz", index)
        self.storage.write(f"commits/{name}.json", to_json(commit))
        return commit

    def write_shard(self, path: Path, sources: list[ImageSource], commit: Commit, bar: tqdm) -> None:
        """Encode the images into a tar at `path` and count them in `commit`. NoReadableImage if it stays empty."""
        grids: Counter[str] = Counter()
        with open(path, "wb") as file, ShardWriter(file) as writer:
            for item in encode_images(sources, self.codec, self.config, self.pool, self.device):
                bar.update()
                if isinstance(item, Failure):
                    commit["failures"].append(asdict(item))
                    continue
                rows, columns = item.latents.shape[2:]
                metadata = {
                    "key": item.source.key,
                    "class": self.folder.classes[item.source.label],
                    "label": item.source.label,
                    "rendition": "native",
                    "image_size": list(item.image_size),
                    "grid": [rows, columns],
                    "source": item.source.name,
                }
                writer.add(item.source.key, item.latents, metadata)
                grids[f"{rows} x {columns}"] += 1
                commit["samples"] += 1
                commit["tokens"] += rows * columns
        commit["grids"] = dict(sorted(grids.items()))
        if not commit["samples"]:
            raise NoReadableImage


class NoReadableImage(Exception):
    """A partition without a single readable image has no shard."""


def prepare_recipe(
    storage: Storage,
    folder: ImageFolder,
    config: EncodeConfig,
    codec: Codec | None,
    ordered: list[ImageSource],
    pool: ThreadPoolExecutor,
) -> Codec:
    """The codec to encode with. Records what the dataset is made from, or checks that it is what was recorded before.

    UserError if the prefix holds a dataset made from something else, naming what differs.
    """
    if codec is not None:
        config = replace(config, factor=codec.factor, channels=codec.channels)
    recipe: dict[str, Any] = {
        "config": asdict(config),
        "classes": list(folder.classes),
        "images": len(folder.images),
        "images_digest": folder.digest(),
    }
    earlier = read_recipe(storage)
    if earlier is None:
        if storage.exists(MANIFEST):
            raise UserError(
                f"encode: {storage.prefix} already holds a dataset of another origin; choose another output"
            )
        codec = codec or fit_dct(ordered, config, pool)
        storage.write(RECIPE, to_json(recipe | {"codec": codec.spec()}))
        return codec
    now, before = flatten(recipe), flatten({name: earlier.get(name) for name in recipe})
    if codec is not None:
        now["codec"], before["codec"] = codec.spec()["digest"], earlier["codec"].get("digest")
    differing = [f"{name} is {now[name]!r}, was {before.get(name)!r}" for name in now if now[name] != before.get(name)]
    if differing:
        raise UserError(
            f"encode: {storage.prefix} was begun with other images or settings ({'; '.join(differing[:4])}); "
            "choose another output, or remove that folder to encode anew"
        )
    return codec or codec_from_spec(earlier["codec"])


def read_recipe(storage: Storage) -> dict[str, Any] | None:
    """What the dataset at the prefix was begun with, or None if there is none. UserError if it cannot be read."""
    try:
        recipe = json.loads(storage.read(RECIPE))
        if not isinstance(recipe, dict) or not isinstance(recipe.get("codec"), dict):
            raise ValueError("not a recipe")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"encode: {storage.prefix}/{RECIPE} is damaged ({error}); choose another output") from error
    return recipe


def build_manifest(commits: Iterable[Commit], codec: Codec, classes: Iterable[str]) -> Manifest:
    """The manifest of committed partitions."""
    filled = [commit for commit in commits if commit["samples"]]
    grids: Counter[str] = Counter()
    for commit in filled:
        grids.update(commit["grids"])
    return Manifest(
        codec=codec.spec(),
        dtype="float16",
        flips=True,
        classes=list(classes),
        samples=sum(commit["samples"] for commit in filled),
        tokens=sum(commit["tokens"] for commit in filled),
        grids=dict(sorted(grids.items())),
        shards=[
            {"tar": f"shards/{commit['name']}.tar", "index": f"index/{commit['name']}.npz"}
            | {name: commit[name] for name in ("samples", "bytes", "sha256", "index_sha256")}
            for commit in filled
        ],
    )


def check_classes(folder: ImageFolder, failures: Iterable[Failure]) -> None:
    """UserError if no image of some class could be read."""
    reasons = {failure.source: failure.reason for failure in failures}
    labels = {image.label for image in folder.images if image.name not in reasons}
    for image in folder.images:
        if image.label not in labels:
            raise UserError(
                f"encode: no image of class {folder.classes[image.label]!r} can be used "
                f"({image.name}: {reasons[image.name]}); mend its images or remove the class folder, "
                "and encode into a new output"
            )


def check_config(config: EncodeConfig) -> None:
    """UserError for a value that cannot be."""
    for item in fields(config):
        if getattr(config, item.name) < 1:
            raise UserError(f"encode: encode.{item.name} must be at least 1, got {getattr(config, item.name)}")


def flatten(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the config's fields named as in the configuration file."""
    config = recipe.get("config") or {}
    return {f"encode.{name}": value for name, value in config.items()} | {
        name: value for name, value in recipe.items() if name != "config"
    }


def to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()
