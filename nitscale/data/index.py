"""The index: where each sample of a dataset lies and what it is, without opening a shard.

An index file belongs to one shard and is a pure function of it: `index_shard` reads the finished tar back. A sample's
id is its position in the concatenation of all shards' indices, in the manifest's order.
"""

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from nitscale.data.shards import (
    EXTRA_MEMBERS,
    LATENT_SUFFIXES,
    LatentRef,
    MemberRef,
    UnreadableSample,
    latent_header,
)
from nitscale.data.storage import Storage
from nitscale.data.tars import DamagedTar, Member, read_at, scan
from nitscale.errors import UserError

COLUMNS = {
    "offset": np.int64,
    "rows": np.int32,
    "columns": np.int32,
    "label": np.int32,
    "rendition": np.uint8,
    "crc32c": np.uint32,
}
"""Arrays of an index file beside `keys` (bytes, UTF-8); one entry a sample. Offset is the first byte of the latent's
numbers, rows and columns are the latent's, and crc32c is (n, v), one for each variant. Optional members have three
more each: MEMBER_offset, MEMBER_length, MEMBER_crc32c. "features" have variants as latents have: offset is that of the
first number, length that of one variant, and crc32c is (n, v)."""
LARGEST_TEXT = 1 << 20
"""Bytes of a sample's .json or .cls."""
READERS = 16
"""Index files that are read at once when a dataset is opened: an object store answers slowly, but many at a time."""


class LatentKind(NamedTuple):
    """What all latents of a dataset have in common."""

    dtype: str
    variants: int
    channels: int


def index_shard(path: Path, renditions: Sequence[str]) -> dict[str, np.ndarray]:
    """Index of a finished shard on local disk. `renditions` numbers the resize rules.

    ValueError if the shard is not what ShardWriter writes.
    """

    def describe(texts: dict[str, bytes]) -> tuple[int, int]:
        metadata = json.loads(texts[".json"])
        return metadata["label"], renditions.index(metadata["rendition"])

    return index_tar(path, describe)[0]


def index_tar(
    path: Path, describe: Callable[[dict[str, bytes]], tuple[int, int]], suffixes: Sequence[str] = LATENT_SUFFIXES
) -> tuple[dict[str, np.ndarray], LatentKind]:
    """Index of a WebDataset tar of latents on local disk, and their kind. `describe` gives label and rendition of a
    sample by its members .json and .cls; `suffixes` are those of latents, (v, c, h, w) or (c, h, w).

    ValueError that names tar and member if the tar is damaged, a member is no latent, or its kind is another.
    """
    samples: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    first: LatentKind | None = None
    with open(path, "rb") as file:
        try:
            for member in scan(file):
                folder, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                key, suffix = folder + slash + stem, dot + suffix
                sample = samples.setdefault(key, {})
                if suffix in suffixes:
                    payload = read_at(file, member.offset, member.size)
                    dtype, shape, start = latent_header(suffix, payload)
                    if len(shape) not in (3, 4):
                        raise ValueError(f"a latent is (c, h, w) or (v, c, h, w), not {list(shape)}")
                    kind = LatentKind(dtype, shape[0] if len(shape) == 4 else 1, shape[-3])
                    if kind != (first := first or kind):
                        raise ValueError(f"{kind}, but the samples before are {first}")
                    variants = np.frombuffer(payload, np.uint8, offset=start).reshape(kind.variants, -1)
                    sample |= {"offset": member.offset + start, "rows": shape[-2], "columns": shape[-1]}
                    sample |= {"crc32c": [google_crc32c.value(variant.tobytes()) for variant in variants]}
                elif suffix in (".json", ".cls"):
                    if member.size > LARGEST_TEXT:
                        raise ValueError(f"it has {member.size:,} bytes")
                    texts.setdefault(key, {})[suffix] = read_at(file, member.offset, member.size)
                elif suffix == EXTRA_MEMBERS["features"]:
                    payload = read_at(file, member.offset, member.size)
                    dtype, shape, start = latent_header(suffix, payload)
                    if dtype != "float16" or len(shape) != 3:
                        raise ValueError(f"features are float16 (v, tokens, Z), not {dtype} {list(shape)}")
                    variants = np.frombuffer(payload, np.uint8, offset=start).reshape(shape[0], -1)
                    sample |= {"features_offset": member.offset + start, "features_length": variants.shape[1]}
                    sample |= {"features_crc32c": [google_crc32c.value(variant.tobytes()) for variant in variants]}
                elif name := next((name for name, extra in EXTRA_MEMBERS.items() if extra == suffix), None):
                    sample |= {f"{name}_offset": member.offset, f"{name}_length": member.size}
                    sample |= {f"{name}_crc32c": google_crc32c.value(read_at(file, member.offset, member.size))}
            samples = {key: sample for key, sample in samples.items() if "offset" in sample}
            for key, sample in samples.items():
                member = Member(key, 0, 0)  # for the message
                if len(sample.get("features_crc32c", sample["crc32c"])) != len(sample["crc32c"]):
                    raise ValueError("features and latent do not have the same variants")
                sample["label"], sample["rendition"] = describe(texts.get(key, {}))
        except DamagedTar as error:
            raise ValueError(f"index: {path.name} is damaged: {error}") from error
        except (ValueError, KeyError, TypeError, RecursionError, UnreadableSample) as error:
            raise ValueError(f"index: {path.name}: {member.name}: {error!r}") from error
    if first is None:
        raise ValueError(f"index: {path.name}: no latent (a member {' or '.join(suffixes)})")
    shared = [name for name in EXTRA_MEMBERS if all(f"{name}_offset" in sample for sample in samples.values())]
    columns = COLUMNS | extra_columns(shared)
    arrays = {name: np.array([sample[name] for sample in samples.values()], kind) for name, kind in columns.items()}
    return {"keys": np.array([key.encode() for key in samples], np.bytes_), **arrays}, first


def extra_columns(members: Iterable[str]) -> dict[str, Any]:
    """Names and types of the columns of optional members."""
    kinds = {"offset": np.int64, "length": np.int64, "crc32c": np.uint32}
    return {f"{member}_{name}": kind for member in members for name, kind in kinds.items()}


def index_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """The index file's contents: the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_arrays(data: bytes, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays of an index file. ValueError, KeyError or BadZipFile if the file is not what `index_bytes` writes.

    Neither a compressed member nor a header that promises more than is there can take memory.
    """
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        for name in names:
            member = file.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data):
                raise ValueError(f"array {name!r} is compressed")
            payload = file.read(member)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream := io.BytesIO(payload[8:]))
            start = 8 + stream.tell()
            if fortran_order or dtype.hasobject or math.prod(shape) * dtype.itemsize != len(payload) - start:
                raise ValueError(f"array {name!r} is not a plain, whole one")
            arrays[name] = np.frombuffer(payload, dtype, offset=start).reshape(shape)
    return arrays


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """All samples of a dataset; each array has one entry a sample, (samples,)."""

    shards: tuple[str, ...]
    """Object name of each shard."""
    shard_starts: np.ndarray
    """(shards + 1,) int64: the first sample id of each shard, and the number of samples."""
    offset: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    label: np.ndarray
    rendition: np.ndarray
    crc32c: np.ndarray
    """(samples, v)."""
    extra: dict[str, np.ndarray]
    """Columns of the optional members."""
    _index_names: tuple[str, ...]
    _storage: Storage

    @property
    def num_samples(self) -> int:
        return int(self.shard_starts[-1])

    def shard_of(self, sample_ids: Any) -> Any:
        """Position in `shards` of each sample's shard."""
        return np.searchsorted(self.shard_starts, sample_ids, side="right") - 1

    def ref(self, sample_id: int) -> LatentRef:
        """Where sample `sample_id` lies."""
        return self.refs(np.array([sample_id]))[0]

    def refs(self, sample_ids: np.ndarray) -> list[LatentRef]:
        """Where the samples lie."""
        columns = (self.shard_of(sample_ids), self.offset[sample_ids], self.rows[sample_ids], self.columns[sample_ids])
        rows = zip(*(column.tolist() for column in columns), self.crc32c[sample_ids].tolist(), strict=True)
        return [LatentRef(self.shards[shard], at, (h, w), tuple(crc32c)) for shard, at, h, w, crc32c in rows]

    def member_refs(self, member: str, sample_ids: np.ndarray, flips: np.ndarray) -> list[MemberRef]:
        """Where an optional member of the samples lies; of "features" the variant that `flips` (bool) says."""
        offset, length, crc32c = (self.extra[f"{member}_{name}"][sample_ids] for name in ("offset", "length", "crc32c"))
        if crc32c.ndim == 2:
            offset, crc32c = offset + flips * length, crc32c[np.arange(len(flips)), flips.astype(np.int64)]
        columns = (self.shard_of(sample_ids), offset, length, crc32c)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [MemberRef(self.shards[shard], *where) for shard, *where in rows]

    def key(self, sample_id: int) -> str:
        """The sample's key."""
        return self.keys(np.array([sample_id]))[0]

    def keys(self, sample_ids: np.ndarray) -> list[str]:
        """The samples' keys, read from their shards' indices when asked: keys are most of an index's bytes."""
        shards, found = self.shard_of(sample_ids), np.empty(len(sample_ids), object)
        for shard in np.unique(shards):
            keys = read_arrays(self._storage.read(self._index_names[shard]), ["keys"])["keys"]
            found[shards == shard] = keys[sample_ids[shards == shard] - self.shard_starts[shard]]
        return [bytes(key).decode() for key in found]


def load_index(
    storage: Storage,
    shards: list[dict[str, Any]],
    num_classes: int,
    bytes_per_cell: int,
    variants: int,
    members: Sequence[str] = (),
    renditions: int = 1,
) -> DatasetIndex:
    """Concatenate the indices of the manifest's `shards`. UserError if one is missing, damaged or out of bounds.

    `bytes_per_cell` of one variant: channels x bytes of a number.
    """
    kinds = COLUMNS | extra_columns(members)

    def read(shard: dict[str, Any]) -> dict[str, np.ndarray]:
        name = shard["index"]
        advice = f"of dataset {storage.prefix}: copy it again, or run the job again that made it"
        try:
            data = storage.read(name)
        except OSError as error:
            raise UserError(f"index: cannot read {name} ({error.strerror or error}) {advice}") from error
        if hashlib.sha256(data).hexdigest() != shard["index_sha256"]:
            raise UserError(f"index: {name} differs from its hash in the manifest {advice}")
        try:
            part = read_arrays(data, kinds)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"index: {name} is damaged ({error}) {advice}") from error
        if reason := _contradiction(part, shard, num_classes, bytes_per_cell, variants, renditions):
            raise UserError(f"index: {name} {reason} {advice}")
        return part

    with ThreadPoolExecutor(READERS, thread_name_prefix="index") as pool:
        parts = list(pool.map(read, shards))
    starts = np.concatenate([[0], np.cumsum([shard["samples"] for shard in shards])]).astype(np.int64)
    arrays = {column: np.concatenate([part[column] for part in parts]) for column in kinds}
    return DatasetIndex(
        shards=tuple(shard["tar"] for shard in shards),
        shard_starts=starts,
        **{column: arrays[column] for column in COLUMNS},
        extra={column: arrays[column] for column in arrays if column not in COLUMNS},
        _index_names=tuple(shard["index"] for shard in shards),
        _storage=storage,
    )


def _contradiction(
    part: dict[str, np.ndarray],
    shard: dict[str, Any],
    num_classes: int,
    bytes_per_cell: int,
    variants: int,
    renditions: int,
) -> str | None:
    """What is wrong with an index: a lying one must not make a reader go out of bounds or take unbounded memory."""
    for name, column in part.items():
        of_variants = name in ("crc32c", "features_crc32c")
        shape = (shard["samples"], variants) if of_variants else (shard["samples"],)
        kind = COLUMNS.get(name) or extra_columns(EXTRA_MEMBERS)[name]
        if column.shape != shape or column.dtype != kind:
            return f"does not have {shard['samples']} entries of the known types"
    if shard["samples"] == 0:
        return "is empty"
    starts = [name for name in part if name.endswith("offset")]
    if min(part["rows"].min(), part["columns"].min(), *(part[name].min() + 1 for name in starts)) < 1:
        return "has an empty grid or a negative offset"
    room = (shard["bytes"] - part["offset"]) // (
        bytes_per_cell * variants
    )  # in cells; compared thus, nothing overflows
    behind = (part["rows"].astype(np.int64) * part["columns"] > room).any()
    for name in starts[1:]:
        length = part[name.replace("offset", "length")]
        copies = variants if name == "features_offset" else 1
        behind |= (length < 0).any() or ((shard["bytes"] - part[name]) // copies < length).any()
    if behind:
        return "points behind the end of its shard"
    if part["label"].min() < 0 or part["label"].max() >= num_classes:
        return f"has a class outside 0..{num_classes - 1}"
    if part["rendition"].max() >= renditions:
        return f"has a rendition outside 0..{renditions - 1}"
    return None
