"""The manifest: what a dataset is, in one JSON file that is written last, and the way to open a dataset.

The manifest's digest is the dataset's version: it covers the codec, the classes and the hashes of shards and indices.
"""

import hashlib
import json
import posixpath
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nitscale.autoencoders import Codec, codec_from_spec
from nitscale.data.cache import CachedStorage
from nitscale.data.index import DatasetIndex, load_index
from nitscale.data.objects import check_name
from nitscale.data.shards import EXTRA_MEMBERS, LATENT_DTYPES, LATENT_SUFFIXES, read_latent
from nitscale.data.storage import Storage, open_storage
from nitscale.errors import UserError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Manifest:
    """What is in a dataset; the fields of manifest.json."""

    codec: dict[str, Any]
    """`spec()` of the codec: id, factor, channels, its parameters, digest."""
    dtype: str
    """Of the latents: float16, bfloat16 or float32."""
    flips: bool
    """Whether every sample also has the latent of its mirror image."""
    classes: list[str]
    """Name of each class; a label is a position in this list."""
    samples: int
    tokens: int
    """Latent cells of all samples: tokens at patch size 1."""
    grids: dict[str, int]
    """Number of samples of each latent size, "rows x columns"."""
    shards: list[dict[str, Any]]
    """Of each shard: tar and index (object names), samples, bytes, sha256, index_sha256."""
    renditions: list[str] = field(default_factory=lambda: ["native"])
    """Resize rules whose results are in the dataset."""
    latent_suffixes: list[str] = field(default_factory=lambda: list(LATENT_SUFFIXES))
    """Of the members that are latents; others in tars that someone else wrote."""
    members: list[str] = field(default_factory=list)
    """Optional members that every sample has: "image", "text", "features"."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Contents of manifest.json: the same text for the same manifest."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, sort_keys=True) + "\n"

    @property
    def digest(self) -> str:
        """The dataset's version: sha256 of the canonical JSON."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def channels(self) -> int:
        return int(self.codec["channels"])

    @property
    def factor(self) -> int:
        """Pixels of one latent cell's side."""
        return int(self.codec["factor"])

    @property
    def bytes_per_cell(self) -> int:
        """Of one variant of a latent."""
        return self.channels * LATENT_DTYPES[self.dtype].itemsize

    @property
    def variants(self) -> int:
        """Latents of a sample: 2 with the mirror image, else 1."""
        return 1 + self.flips


@dataclass(frozen=True)
class Dataset:
    """An opened dataset."""

    manifest: Manifest
    index: DatasetIndex
    storage: Storage

    def cached(self, folder: str | Path, limit_bytes: int) -> "Dataset":
        """The same dataset, of which shards are read from copies in `folder`, which holds at most `limit_bytes`."""
        shards = {shard["tar"]: (shard["bytes"], shard["sha256"]) for shard in self.manifest.shards}
        return replace(self, storage=CachedStorage(self.storage, folder, limit_bytes, shards))

    def latent(self, sample_id: int, flipped: bool = False) -> Tensor:
        """One latent (channels, h, w) as it is stored. UnreadableSample if it cannot be read."""
        ref = self.index.ref(sample_id)
        return read_latent(self.storage, ref, self.manifest.channels, self.manifest.dtype, flipped)

    def codec(self) -> Codec:
        """The codec that made the latents. UserError if this build does not know it."""
        return codec_from_spec(self.manifest.codec)


def load_dataset(prefix: str | Path) -> Dataset:
    """Open the dataset at `prefix`: manifest, every index, and a check that every shard is there with its size.

    UserError if the manifest is missing, damaged or of another version, or a shard or index is not what it says.
    """
    storage = open_storage(prefix)
    manifest = read_manifest(storage)
    sizes: dict[str, int] = {}
    for folder in sorted({posixpath.dirname(shard["tar"]) for shard in manifest.shards}):
        sizes |= storage.list(folder)
    for shard in manifest.shards:
        name = shard["tar"]
        size = sizes.get(name)
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
            raise UserError(
                f"manifest: shard {name} of dataset {prefix} {found}; copy it again, or run the encode again, "
                "which makes only what is missing"
            )
    index = load_index(
        storage,
        manifest.shards,
        num_classes=len(manifest.classes),
        bytes_per_cell=manifest.bytes_per_cell,
        variants=manifest.variants,
        members=manifest.members,
        renditions=len(manifest.renditions),
    )
    return Dataset(manifest, index, storage)


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of a dataset. UserError as `load_dataset`."""
    where = f"{storage.prefix}/{MANIFEST}"
    try:
        text = storage.read(MANIFEST).decode()
        content = json.loads(text)
    except FileNotFoundError as error:
        raise UserError(
            f"manifest: there is no dataset at {storage.prefix} (no {MANIFEST}); make one with `nitscale encode`, "
            "or let an interrupted one finish by running it again"
        ) from error
    except OSError as error:
        raise UserError(f"manifest: cannot read {where}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"manifest: {where} is damaged: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"manifest: {where} has schema_version {version!r}, this build reads {SCHEMA_VERSION}; "
            "encode the images again"
        )
    try:
        manifest = Manifest(**content)
        expected = {"codec": dict, "dtype": str, "flips": bool, "classes": list, "samples": int, "shards": list}
        expected |= {"renditions": list, "members": list, "latent_suffixes": list}
        wrong = [name for name, kind in expected.items() if not isinstance(getattr(manifest, name), kind)]
        wrong += ["members"] * (not set(manifest.members) <= set(EXTRA_MEMBERS))
        for shard in manifest.shards:
            wrong += [n for n in ("tar", "index", "sha256", "index_sha256") if not isinstance(shard[n], str)]
            wrong += [n for n in ("samples", "bytes") if not isinstance(shard[n], int) or shard[n] < 1]
        wrong += ["samples"] * (manifest.samples != sum(shard["samples"] for shard in manifest.shards))
        wrong += ["codec"] * (manifest.channels < 1 or manifest.factor < 1)
    except (TypeError, KeyError, ValueError) as error:
        known = ", ".join(field.name for field in fields(Manifest))
        raise UserError(f"manifest: {where} is damaged: {error!r}; its fields are {known}") from error
    for shard in manifest.shards if not wrong else ():
        check_name(shard["tar"], storage.prefix)
        check_name(shard["index"], storage.prefix)
    if wrong or not manifest.shards:
        raise UserError(f"manifest: {where} is damaged: wrong value of {', '.join(wrong) or 'shards'}")
    if manifest.dtype not in LATENT_DTYPES:
        raise UserError(
            f"manifest: {where} has latents of dtype {manifest.dtype!r}, this build reads {', '.join(LATENT_DTYPES)}"
        )
    return manifest
