"""The index: where each sample of a dataset lies and what it is, without opening a shard.

`index/NNNNNN.npz` belongs to `shards/NNNNNN.tar` and is a pure function of it: `index_shard` reads the finished tar
back. A sample's id is its position in the concatenation of all shards' indices, in the manifest's order.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from nitscale.data.shards import LATENT_SUFFIX, LatentRef, UnreadableSample, latent_header
from nitscale.data.storage import Storage
from nitscale.errors import UserError

COLUMNS = {
    "offset": np.int64,
    "length": np.int64,
    "rows": np.int32,
    "columns": np.int32,
    "label": np.int32,
    "crc32c": np.uint32,
}
"""Arrays of an index file beside `keys` (bytes, UTF-8); one entry a sample. Rows and columns are the latent's."""


def index_shard(path: Path, labels: dict[str, int]) -> tuple[dict[str, np.ndarray], str]:
    """Index of a finished shard on local disk, and the sha256 of its bytes. `labels` numbers the class names.

    ValueError if the shard is not what ShardWriter writes.
    """
    keys: list[bytes] = []
    table: dict[str, list[int]] = {name: [] for name in COLUMNS}
    metadata: dict[str, Any] = {}
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                file.seek(member.offset_data)
                payload = file.read(member.size)
                if member.name.endswith(".json"):
                    metadata = json.loads(payload)
                    continue
                key = member.name.removesuffix(LATENT_SUFFIX)
                try:
                    shape, _ = latent_header(payload)
                except UnreadableSample as error:
                    raise ValueError(f"index: {path.name}: {member.name}: {error}") from error
                keys.append(key.encode())
                row = (member.offset_data, member.size, *shape[2:], labels[metadata["class"]])
                for name, value in zip(COLUMNS, (*row, google_crc32c.value(payload)), strict=True):
                    table[name].append(value)
    arrays = {name: np.array(table[name], dtype) for name, dtype in COLUMNS.items()}
    return {"keys": np.array(keys, np.bytes_), **arrays}, digest


def index_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """The index file's contents: the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """All samples of a dataset; each array has one entry a sample, (samples,)."""

    shards: tuple[str, ...]
    """Object name of each shard."""
    shard_starts: np.ndarray
    """(shards + 1,) int64: the first sample id of each shard, and the number of samples."""
    offset: np.ndarray
    length: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    label: np.ndarray
    crc32c: np.ndarray
    _index_names: tuple[str, ...]
    _storage: Storage

    @property
    def num_samples(self) -> int:
        return int(self.shard_starts[-1])

    def ref(self, sample_id: int) -> LatentRef:
        """Where sample `sample_id` lies."""
        shard = int(np.searchsorted(self.shard_starts, sample_id, side="right")) - 1
        i = sample_id
        grid = (int(self.rows[i]), int(self.columns[i]))
        return LatentRef(self.shards[shard], int(self.offset[i]), int(self.length[i]), grid, int(self.crc32c[i]))

    def key(self, sample_id: int) -> str:
        """The sample's key, read from its shard's index when asked: keys are most of an index's bytes."""
        shard = int(np.searchsorted(self.shard_starts, sample_id, side="right")) - 1
        with np.load(io.BytesIO(self._storage.read(self._index_names[shard])), allow_pickle=False) as file:
            return bytes(file["keys"][sample_id - int(self.shard_starts[shard])]).decode()


def load_index(storage: Storage, shards: list[dict[str, Any]], num_classes: int) -> DatasetIndex:
    """Concatenate the indices of the manifest's `shards`. UserError if one is missing, damaged or out of bounds."""
    parts: list[dict[str, np.ndarray]] = []
    names = [f"index/{shard['name']}.npz" for shard in shards]
    for name, shard in zip(names, shards, strict=True):
        advice = f"of dataset {storage.prefix}: run the encode again, it makes only what is missing"
        try:
            data = storage.read(name)
        except OSError as error:
            raise UserError(f"index: cannot read {name} ({error.strerror}) {advice}") from error
        if hashlib.sha256(data).hexdigest() != shard["index_sha256"]:
            raise UserError(f"index: {name} differs from its hash in the manifest {advice}")
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                parts.append({column: file[column] for column in COLUMNS})
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"index: {name} is damaged ({error}) {advice}") from error
        if reason := _contradiction(parts[-1], shard, num_classes):
            raise UserError(f"index: {name} {reason} {advice}")
    starts = np.concatenate([[0], np.cumsum([shard["samples"] for shard in shards])]).astype(np.int64)
    arrays = {column: np.concatenate([part[column] for part in parts]) for column in COLUMNS}
    object_names = tuple(f"shards/{shard['name']}.tar" for shard in shards)
    return DatasetIndex(object_names, starts, **arrays, _index_names=tuple(names), _storage=storage)


def _contradiction(part: dict[str, np.ndarray], shard: dict[str, Any], num_classes: int) -> str | None:
    """What is wrong with an index: a lying one must not make a reader go out of bounds or take unbounded memory."""
    if any(part[name].shape != (shard["samples"],) or part[name].dtype != dtype for name, dtype in COLUMNS.items()):
        return f"does not have {shard['samples']} entries of the known types"
    if shard["samples"] == 0:
        return "is empty"
    if min(part["rows"].min(), part["columns"].min(), part["length"].min()) < 1 or part["offset"].min() < 0:
        return "has an empty grid or a negative offset"
    if (part["offset"] > shard["bytes"] - part["length"]).any():
        return "points behind the end of its shard"
    if part["label"].min() < 0 or part["label"].max() >= num_classes:
        return f"has a class outside 0..{num_classes - 1}"
    return None
