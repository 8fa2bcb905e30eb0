"""`nitscale encode`: images of any archive → a dataset of latent shards, by one job or by many.

A source is a list of partitions. A job makes those of its share that are missing, one after the other: each becomes
shards, their indices and a commit marker, in this order. The manifest comes last, when all are there. Killed at any
point, the same command goes on from there and ends with the same bytes.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data_prep.catalogs import CatalogSource
from data_prep.commits import COMMITS, INDICES, SHARDS, Commit, read_commits
from data_prep.encoder import Encoder
from data_prep.finish import check_failures, finish
from data_prep.items import Partition
from data_prep.job import Job, Outcome, Share, progress_bar, run_job
from data_prep.prepare import EncodeConfig, preparation
from data_prep.recipe import check_recipe, complete, describe, read_recipe, settle_recipe
from data_prep.report import EncodeReport, make_report
from data_prep.sources import Source, open_source
from data_prep.stages import Clock
from data_prep.writer import Layout
from nitscale.autoencoders import Codec, codec_from_spec, load_codec
from nitscale.data.shards import LATENT_DTYPES
from nitscale.data.storage import Storage, open_storage
from nitscale.errors import UserError
from nitscale.files import remove_leftovers

__all__ = ["EncodeConfig", "EncodeReport", "JobOptions", "encode", "encode_folder"]

CATALOG = "catalog.npz"
"""Where every image lies in the tars of ImageNet, so that they are scanned by one job only."""


@dataclass(frozen=True)
class JobOptions:
    """How an encode is run, which changes nothing about the dataset."""

    device: torch.device | str = "cpu"
    workers: int | None = None
    """Threads that decode; default: one a core."""
    codec_threads: int = 1
    """Threads of the codec, on a CPU: more help a network, and harm the DCT codec."""
    share: Share | None = None
    """One job of several, which does not finish the dataset; None makes all that is missing, and finishes it."""
    only: Literal["prepare", "finish"] | None = None
    """"prepare": write the recipe and stop. "finish": make no more partitions."""
    retry_failed: bool = False
    """Make partitions anew in which images failed, which may have been mended since (under their old names)."""
    max_failures: float = 0.01
    """Share of the images that may fail (or 20 images, if that is more)."""
    progress: bool = True
    """Whether to show a bar, where the output is a terminal."""


def encode_folder(
    images: str | Path,
    output: str | Path,
    config: EncodeConfig | None = None,
    *,
    codec: Codec | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    progress: bool = True,
    max_failures: float = 0.01,
) -> EncodeReport:
    """Encode the image folder `images` into a dataset at `output`, or finish one that was interrupted. See `encode`."""
    options = JobOptions(device=device, workers=workers, progress=progress, max_failures=max_failures)
    return encode(images, output, config, codec=codec, options=options, kind="folder")


def encode(
    source: str | Path,
    output: str | Path,
    config: EncodeConfig | None = None,
    *,
    codec: Codec | str | None = None,
    codec_dtype: str = "bfloat16",
    options: JobOptions | None = None,
    kind: str = "auto",
    captions: str | Path | None = None,
    classes: str | Path | None = None,
) -> EncodeReport:
    """Encode `source` (see `open_source` for it, `kind`, `captions` and `classes`) into a dataset at `output`.

    `codec` is "dct" or None: the DCT codec of the config, standardised on the first images; or a codec, or a name that
    `load_codec` knows, computing in `codec_dtype`, whose factor and channels take the place of the config's. Images
    that cannot be used are skipped, counted, and listed in the report and in failures.jsonl.

    UserError if the source is not what it should be, `output` holds another dataset, partitions cannot be read, or are
    missing when it is to be finished, too many images fail, no image of a class can be used, or the disk is full or
    read-only. Partitions that were committed are kept in any case.
    """
    started = time.perf_counter()
    config, options = config or EncodeConfig(), options or JobOptions()
    check(config, codec_dtype, options)
    check_places(str(source), str(output))
    codec = None if codec == "dct" else codec
    storage = open_storage(output)
    opened = open_with_catalog(storage, partial(open_source, source, kind, captions, classes))
    partitions = opened.partitions(max(1, config.shard_samples // len(config.resize)))
    share = options.share or Share(0, 1)
    mine = [(number, partition) for number, partition in enumerate(partitions) if share.mine(number)]
    workers, outcome = options.workers or len(os.sched_getaffinity(0)), Outcome()
    if options.only == "finish":
        recipe = read_recipe(storage)
        if recipe is None:
            raise UserError(f"encode: nothing was begun in {storage.prefix}; run the command without --finish first")
        check_recipe(storage, recipe, describe(opened, partitions, config, codec, captions))
    else:
        remove_unfinished(storage)
        codec = load_codec(codec, LATENT_DTYPES[codec_dtype]) if isinstance(codec, str) else codec
        wanted = describe(opened, partitions, config, codec, captions)
        first_images = partial(complete, opened, partitions, config, codec, workers)
        recipe = settle_recipe(storage, wanted, codec, first_images, mended=options.retry_failed)
        codec = codec or codec_from_spec(recipe["codec"])
        prepare = preparation(config, codec.factor, Clock())
        if options.only != "prepare":
            layout = Layout(config, opened.classes, recipe["text"])
            encoder = Encoder(codec.to(options.device), torch.device(options.device), config.dtype, config.flips)
            job = Job(storage, opened, layout, encoder, prepare, workers, options.codec_threads)
            outcome = make_missing(job, mine, options)
    names = [partition.name for _, partition in mine]
    if options.only == "prepare" or options.share is not None:
        manifest, commits = None, list(read_commits(storage, names)[0].values())
        check_failures(commits, None, options.max_failures, storage)
    else:
        manifest, commits = finish(storage, recipe, names, options.max_failures)
    seconds = time.perf_counter() - started
    return make_report(
        storage.prefix, len(mine), len(partitions), commits, manifest, outcome, opened.ignored, workers, seconds
    )


def default_device() -> str:
    """A GPU if there is one, unless NITSCALE_DEVICE=cpu."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("NITSCALE_DEVICE") != "cpu" else "cpu"


def open_with_catalog(storage: Storage, open_it: Callable[..., Source]) -> Source:
    """The source; what a scan of its tars found is kept in the dataset's prefix, or taken from there."""
    try:
        catalog: bytes | None = storage.read(CATALOG)
    except (FileNotFoundError, NotADirectoryError):
        catalog = None
    try:
        source = open_it(catalog=catalog)
    except UserError as error:
        if catalog is None:
            raise
        raise UserError(f"{error} (with the catalog of an earlier run, {storage.prefix}/{CATALOG})") from error
    if catalog is None and isinstance(source, CatalogSource) and (source.catalog.offset >= 0).any():
        storage.put_if_absent(CATALOG, source.catalog.to_bytes())
    return source


def make_missing(job: Job, mine: Sequence[tuple[int, Partition]], options: JobOptions) -> Outcome:
    """Make those of the partitions that are not committed, or have failures that are to be tried again.

    UserError if some cannot be read, after the others were made; or if too many images fail, as soon as that is sure.
    """
    storage = job.storage
    whole, damaged = read_commits(storage, [partition.name for _, partition in mine])
    again = {name for name, commit in whole.items() if options.retry_failed and commit["failures"]}
    kept = [commit for name, commit in whole.items() if name not in again]
    to_do = [
        (number, partition) for number, partition in mine if partition.name not in whole or partition.name in again
    ]
    numbers = [partition.num_images for _, partition in mine]
    images = None if None in numbers else sum(number or 0 for number in numbers)

    def committed(*commits: Commit) -> None:
        kept.extend(commits)
        if images is not None:
            check_failures(kept, images, options.max_failures, storage)

    if to_do:
        committed()
    done, failed = sum(commit["images"] for commit in kept), 0
    with progress_bar(images, done, options.progress) as bar:

        def progress(images: int, failures: int) -> None:
            nonlocal failed
            failed += failures
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(images)

        outcome = run_job(job, to_do, frozenset(again | damaged), progress, committed) if to_do else Outcome()
    if outcome.given_up:
        raise UserError(
            f"encode: {len(outcome.given_up)} of {len(to_do)} partitions cannot be read, the others are committed; "
            f"mend the source and run again. The first: {outcome.given_up[0]}"
        )
    return outcome


def remove_unfinished(storage: Storage) -> None:
    """Remove the temporary files that killed jobs of this host left in a folder. (Those of S3 lie on the local disk,
    and are removed by the storage.)"""
    if "://" not in storage.prefix:
        for folder in ("", COMMITS, SHARDS, INDICES):
            remove_leftovers(Path(storage.prefix, folder))


def check_places(source: str, output: str) -> None:
    """UserError if the output would become a part of the source."""
    if "://" in source or "://" in output:
        inside = f"{output.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    else:
        inside = Path(output).resolve().is_relative_to(Path(source).resolve())
    if inside:
        raise UserError(f"encode: the output {output} lies in the source {source}; choose another output")


def check(config: EncodeConfig, codec_dtype: str, options: JobOptions) -> None:
    """UserError for a value that cannot be."""
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 1:
            raise UserError(f"encode: encode.{item.name} must be at least 1, got {value}")
    for name, dtype in (("dtype", config.dtype), ("codec_dtype", codec_dtype)):
        if dtype not in LATENT_DTYPES:
            raise UserError(f"encode: {name} is one of {', '.join(LATENT_DTYPES)}, got {dtype!r}")
    if not config.resize or len(set(config.resize)) < len(config.resize) or len(config.resize) > 256:
        raise UserError(f"encode: name every resize rule once, e.g. native,square-256; got {','.join(config.resize)!r}")
    if not 0 <= options.max_failures <= 1:
        raise UserError(f"encode: --max-failures is a share from 0 to 1, got {options.max_failures}")
    if options.only == "finish" and options.share is not None:
        raise UserError("encode: --finish is for all partitions; leave --job and --of out")
    if min(1 if options.workers is None else options.workers, options.codec_threads) < 1:
        raise UserError("encode: give at least one worker and one thread to the codec")
    try:
        there = torch.device(options.device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        raise UserError(f"encode: there is no device {options.device!r}; give cpu, cuda or cuda:1") from None
    if not there:
        raise UserError(f"encode: this machine has no GPU for --device {options.device}; give --device cpu")
