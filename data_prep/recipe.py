"""encode.json: what a dataset is being made from, written once, before anything else.

Every job checks that it makes the same dataset, so that a prefix never mixes two. Of several jobs that begin at once
one writes the recipe, with what the first images decided (the DCT codec's standardisation, whether there are captions);
the others take it from there.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from data_prep.catalogs import CatalogSource
from data_prep.commits import COMMITS, to_json
from data_prep.encoder import cpu_threads, to_float
from data_prep.items import ImageItem, Partition
from data_prep.mixed import TarSource
from data_prep.prepare import EncodeConfig, Failure, Sample, preparation, quiet_pillow
from data_prep.sources import Source
from data_prep.stages import Clock
from nitscale.autoencoders import Codec, DCTCodec
from nitscale.data.manifest import MANIFEST
from nitscale.data.storage import Storage
from nitscale.errors import UserError

RECIPE = "encode.json"
FIRST_CAPTIONS = 64
"""Images of which one must have a caption, if none are promised."""

Recipe: TypeAlias = dict[str, Any]
"""config, classes, partitions, images, digests of images, names and captions; then codec (its spec) and text."""


def describe(
    source: Source,
    partitions: Sequence[Partition],
    config: EncodeConfig,
    codec: Codec | str | None,
    captions: str | Path | None,
) -> Recipe:
    """What is known before any image is read. Without factor and channels, if they are those of a codec that is only
    named."""
    if codec is not None and not isinstance(codec, str):
        config = replace(config, factor=codec.factor, channels=codec.channels)
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    if isinstance(codec, str):
        del settings["factor"], settings["channels"]
    numbers = [partition.num_images for partition in partitions]
    return {
        "config": settings,
        "classes": None if source.classes is None else list(source.classes),
        "partitions": len(partitions),
        "images": None if None in numbers else sum(number or 0 for number in numbers),
        "images_digest": source.digest,
        "names_digest": names_digest(source),
        "captions_digest": None if captions is None else hashlib.sha256(Path(captions).read_bytes()).hexdigest(),
    }


def names_digest(source: Source) -> str | None:
    """sha256 of the names of images, or of tars, in the source's order."""
    if isinstance(source, CatalogSource):
        names = source.catalog.names
    elif isinstance(source, TarSource):
        names = tuple(source.tars)
    else:
        return None
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def complete(
    source: Source, partitions: Sequence[Partition], config: EncodeConfig, codec: Codec | None, workers: int
) -> Recipe:
    """What the first images decide."""
    text = config.text
    if text is None:
        with closing(all_items(source, partitions)) as items:
            text = any(item.text is not None for item in islice(items, FIRST_CAPTIONS))
    return {"codec": (codec or fit_dct(source, partitions, config, workers)).spec(), "text": text}


def settle_recipe(
    storage: Storage, wanted: Recipe, codec: Codec | None, complete: Callable[[], Recipe], mended: bool = False
) -> Recipe:
    """The prefix's recipe: the one that is there, or `wanted` with what `complete` gives, which is written then.

    `codec` must be that of the recipe; None is content with any. With `mended`, images may have other contents than
    they had (not other names). UserError if the prefix holds a dataset made from something else, naming what differs.
    """
    earlier = read_recipe(storage)
    if earlier is None:
        if storage.exists(MANIFEST) or storage.list(COMMITS):
            raise UserError(
                f"encode: {storage.prefix} already holds a dataset of another origin; choose another output"
            )
        recipe = wanted | complete()
        if storage.put_if_absent(RECIPE, to_json(recipe)):
            return recipe
        earlier = read_recipe(storage)  # another job's, which was quicker
        assert earlier is not None
    if mended and earlier["images_digest"] != wanted["images_digest"]:
        earlier["images_digest"] = wanted["images_digest"]
        check_recipe(storage, earlier, wanted, codec)
        storage.write(RECIPE, to_json(earlier))
    check_recipe(storage, earlier, wanted, codec)
    return earlier


def check_recipe(storage: Storage, earlier: Recipe, wanted: Recipe, codec: Codec | None = None) -> None:
    """UserError if the prefix's recipe is not the one that is wanted."""
    now, before = flatten(wanted), flatten(earlier)
    if codec is not None:
        now["codec"], before["codec"] = codec.spec()["digest"], earlier["codec"].get("digest")
    differing = [f"{name} is {now[name]!r}, was {before.get(name)!r}" for name in now if now[name] != before.get(name)]
    if differing:
        raise UserError(
            f"encode: {storage.prefix} was begun with other images or settings ({'; '.join(differing[:4])}); "
            "choose another output, or remove that dataset to encode anew"
        )


def read_recipe(storage: Storage) -> Recipe | None:
    """What the dataset at the prefix was begun with, or None if there is none. UserError if it cannot be read."""
    try:
        recipe = json.loads(storage.read(RECIPE))
        if not isinstance(recipe, dict) or not isinstance(recipe.get("codec"), dict):
            raise ValueError("not a recipe")
    except (FileNotFoundError, NotADirectoryError):  # whatever is in the way will be named when something is written
        return None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"encode: {storage.prefix}/{RECIPE} is damaged ({error}); choose another output") from error
    return recipe


def flatten(recipe: Recipe) -> Recipe:
    """The recipe with the config's fields named as in messages."""
    config = recipe.get("config") or {}
    return {f"encode.{name}": value for name, value in config.items()} | {
        name: value for name, value in recipe.items() if name not in ("config", "codec")
    }


def fit_dct(source: Source, partitions: Sequence[Partition], config: EncodeConfig, workers: int) -> DCTCodec:
    """The DCT codec of the config, standardised on the first readable images, by all rules. UserError if there is
    none."""
    prepare, failures = preparation(config, config.factor, Clock()), list[Failure]()

    def images() -> Iterator[Tensor]:
        found = 0
        with quiet_pillow(), closing(all_items(source, partitions)) as items, ThreadPoolExecutor(workers) as pool:
            while chunk := list(islice(items, 64)):
                for prepared in pool.map(prepare, chunk):
                    samples = [sample for sample in prepared if isinstance(sample, Sample)]
                    failures.extend(failure for failure in prepared if isinstance(failure, Failure))
                    for sample in samples:
                        yield to_float(torch.from_numpy(sample.pixels[None].copy()))
                    found += bool(samples)
                    if found == config.fit_images:
                        return

    fitted = images()
    if (first := next(fitted, None)) is None:
        reasons = "; ".join(f"{failure.source}: {failure.reason}" for failure in failures[:3])
        raise UserError(f"encode: none of the {len(failures):,} images can be used ({reasons})")
    with cpu_threads(1):
        return DCTCodec(config.factor, config.channels).fit(chain([first], fitted))


def all_items(source: Source, partitions: Sequence[Partition]) -> Generator[ImageItem, None, None]:
    """The images of all partitions that can be read. UserError if there are none, and some cannot."""
    images, failed = 0, None
    for partition in partitions:
        try:
            for item in source.items(partition):
                images += 1
                yield item
        except UserError as error:  # told when the partition is to be made
            failed = error
    if failed and not images:
        raise failed
