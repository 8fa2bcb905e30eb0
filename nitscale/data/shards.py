"""Latent shards: plain WebDataset tars that anyone can read, and that nitscale reads sample by sample at an offset.

A sample is two members: `KEY.json` (class, sizes, source) and `KEY.latent.npy`, float16 (2, c, h, w): the latent of the
image and that of its mirror image. Nothing in a shard is ever unpickled: a latent is read only if its header says
exactly the dtype and shape that the index promises.
"""

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import webdataset

from nitscale.data.storage import Storage

LATENT_SUFFIX = ".latent.npy"
LATENT_DTYPE = np.dtype("<f2")
NPY_MAGIC = b"\x93NUMPY\x01\x00"


class UnreadableSample(Exception):
    """A sample that is missing, damaged, or not what the index says. The text is the reason."""


@dataclass(frozen=True)
class LatentRef:
    """Where one sample's latent lies and what it must be."""

    shard: str
    """Object name, such as `shards/000000.tar`."""
    offset: int
    """First byte of the `.npy` payload."""
    length: int
    """Bytes of the payload."""
    grid: tuple[int, int]
    """Latent (h, w)."""
    crc32c: int
    """Of the payload."""


class ShardWriter:
    """Writes samples to an open file as a tar, the same bytes for the same samples on every machine and at any time."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="", compress=False)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._tar.close()

    def add(self, key: str, latents: np.ndarray, metadata: dict[str, Any]) -> None:
        """Append one sample: `latents` (2, c, h, w) float16, original and mirrored; `metadata` JSON.

        ValueError for another dtype or shape, or a key with a dot in its last part, which WebDataset would cut.
        """
        if latents.dtype != LATENT_DTYPE or latents.ndim != 4 or len(latents) != 2:
            raise ValueError(f"shards: expected float16 (2, c, h, w), got {latents.dtype} {latents.shape}")
        if not key or "." in key.rsplit("/", 1)[-1]:
            raise ValueError(f"shards: a WebDataset key has no dot in its name, got {key!r}")
        payload = io.BytesIO()
        np.lib.format.write_array(payload, np.ascontiguousarray(latents), version=(1, 0), allow_pickle=False)
        text = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
        self._tar.write({"__key__": key, "json": text.encode(), LATENT_SUFFIX[1:]: payload.getvalue()})


def read_latent(storage: Storage, ref: LatentRef, channels: int, flipped: bool) -> np.ndarray:
    """One latent, (channels, h, w) float16, of the image or of its mirror image.

    UnreadableSample if the shard is missing or cut, the checksum differs, or the payload is not the promised array.
    """
    try:
        payload = storage.read_range(ref.shard, ref.offset, ref.length)
    except OSError as error:
        raise UnreadableSample(f"{ref.shard}: {error.strerror or error}") from error
    if google_crc32c.value(payload) != ref.crc32c:
        raise UnreadableSample(f"{ref.shard}: the checksum of {ref.length} bytes at {ref.offset} differs")
    shape, start = latent_header(payload)
    if shape != (2, channels, *ref.grid):
        raise UnreadableSample(f"{ref.shard}: latent of shape {shape} instead of {(2, channels, *ref.grid)}")
    return np.frombuffer(payload, LATENT_DTYPE, offset=start).reshape(shape)[int(flipped)]


def latent_header(payload: bytes) -> tuple[tuple[int, ...], int]:
    """Shape and first data byte of a latent `.npy` payload. UnreadableSample unless it is plain, whole float16."""
    start = len(NPY_MAGIC) + 2 + int.from_bytes(payload[8:10], "little")
    if not payload.startswith(NPY_MAGIC) or start > len(payload):
        raise UnreadableSample("the payload is not a .npy file of version 1.0")
    shape = _parse_header(payload[:start])
    if shape is None or start + int(np.prod(shape, dtype=object)) * LATENT_DTYPE.itemsize != len(payload):
        raise UnreadableSample("the payload is not a plain float16 array")
    return shape, start


@functools.lru_cache(maxsize=4096)
def _parse_header(header: bytes) -> tuple[int, ...] | None:
    """Shape in a `.npy` header, or None if it is not a plain float16 one. Cached: grids repeat, parsing is slow."""
    try:
        file = io.BytesIO(header[len(NPY_MAGIC) :])
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return None
    return shape if dtype == LATENT_DTYPE and not fortran_order and min(shape, default=0) > 0 else None


def write_shard(path: Path, samples: list[tuple[str, np.ndarray, dict[str, Any]]]) -> None:
    """Write a whole shard of (key, latents, metadata) to a local path, for tests and small sets."""
    with open(path, "wb") as file, ShardWriter(file) as writer:
        for sample in samples:
            writer.add(*sample)
