"""Latent shards: plain WebDataset tars that anyone can read, and that nitscale reads sample by sample at an offset.

A sample is `KEY.json` (label, class, sizes, source) and its latents (v, c, h, w), of the image and, where v is 2, of
its mirror image: `KEY.latent.npy` in float16 or float32, or `KEY.latent.safetensors` with one tensor "latent" in
bfloat16, which NumPy does not know. `KEY.jpg` (the pixels that were encoded) and `KEY.txt` (a caption) are optional.
Nothing in a shard is ever unpickled: training reads the bytes that the index names, as numbers of the dtype and shape
that the manifest and the index promise, and checks them by their crc32c.
"""

import functools
import io
import json
import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import safetensors.torch
import torch
import webdataset
from torch import Tensor

from nitscale.data.storage import Storage

LATENT_SUFFIXES = (".latent.npy", ".latent.safetensors")
LATENT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""What latents may be stored as, by the name in the manifest."""
EXTRA_MEMBERS = {"image": ".jpg", "text": ".txt", "features": ".features.npy"}
"""Optional members of a sample, by the name in the manifest, and their suffix."""
NPY_MAGIC = b"\x93NUMPY\x01\x00"


class UnreadableSample(Exception):
    """A sample that is missing, damaged, or not what the index says. The text is the reason."""


@dataclass(frozen=True)
class LatentRef:
    """Where one sample's latents lie."""

    shard: str
    """Object name, such as `shards/000000-1a2b3c4d.tar`."""
    offset: int
    """First byte of the numbers, behind the header of the member."""
    grid: tuple[int, int]
    """Latent (h, w)."""
    crc32c: tuple[int, ...]
    """Of the bytes of each variant: the image, its mirror image."""


@dataclass(frozen=True)
class MemberRef:
    """Where an optional member of a sample lies, or one variant of it."""

    shard: str
    offset: int
    length: int
    """Bytes."""
    crc32c: int


class ShardWriter:
    """Writes samples to an open file as a tar, the same bytes for the same samples on every machine and at any time."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="", compress=False)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._tar.close()

    def add(
        self,
        key: str,
        latents: Tensor,
        metadata: dict[str, Any],
        image: bytes | None = None,
        text: str | None = None,
        features: Tensor | None = None,
    ) -> None:
        """Append one sample: `latents` (v, c, h, w), original and mirrored or the original alone; `metadata` JSON;
        `features` (v, tokens, Z) float16, an encoder's of each variant.

        ValueError for another dtype or shape, or a key with a dot in its last part, which WebDataset would cut.
        """
        if latents.dtype not in LATENT_DTYPES.values() or latents.ndim != 4 or len(latents) not in (1, 2):
            raise ValueError(f"shards: expected (1 or 2, c, h, w) latents, got {latents.dtype} {tuple(latents.shape)}")
        if not key or "." in key.rsplit("/", 1)[-1]:
            raise ValueError(f"shards: a WebDataset key has no dot in its name, got {key!r}")
        suffix, payload = latent_payload(latents)
        members = {"json": json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode(), suffix[1:]: payload}
        if image is not None:
            members["jpg"] = image
        if text is not None:
            members["txt"] = text.encode()
        if features is not None:
            if features.dtype != torch.float16 or features.ndim != 3 or len(features) != len(latents):
                raise ValueError(
                    f"shards: expected ({len(latents)}, tokens, Z) float16 features, got {features.dtype} "
                    f"{tuple(features.shape)}"
                )
            members["features.npy"] = npy_payload(features)
        self._tar.write({"__key__": key} | members)


def read_latent(
    storage: Storage, ref: LatentRef, channels: int, dtype: str = "float16", flipped: bool = False
) -> Tensor:
    """One latent, (channels, h, w), of the image or of its mirror image. UnreadableSample as `read_latent_bytes`."""
    kind = LATENT_DTYPES[dtype]
    data = read_latent_bytes(storage, ref, channels * kind.itemsize, flipped)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(channels, *ref.grid)


def read_latent_bytes(storage: Storage, ref: LatentRef, bytes_per_cell: int, flipped: bool) -> bytes:
    """The bytes of one latent, (channels, h, w) in row-major order.

    UnreadableSample if the shard is missing or cut, or the checksum differs.
    """
    length = ref.grid[0] * ref.grid[1] * bytes_per_cell
    return read_member(storage, MemberRef(ref.shard, ref.offset + flipped * length, length, ref.crc32c[flipped]))


def read_member(storage: Storage, ref: MemberRef) -> bytes:
    """The bytes of a member. UnreadableSample if the shard is missing or cut, or the checksum differs."""
    try:
        data = storage.read_range(ref.shard, ref.offset, ref.length)
    except OSError as error:
        raise UnreadableSample(f"{ref.shard}: {error.strerror or error}") from error
    if google_crc32c.value(data) != ref.crc32c:
        raise UnreadableSample(f"{ref.shard}: the checksum of {ref.length} bytes at {ref.offset} differs")
    return data


def latent_payload(latents: Tensor) -> tuple[str, bytes]:
    """Suffix and contents of the member that holds `latents`."""
    latents = latents.detach().cpu().contiguous()
    if latents.dtype == torch.bfloat16:
        return ".latent.safetensors", safetensors.torch.save({"latent": latents})
    return ".latent.npy", npy_payload(latents)


def npy_payload(tensor: Tensor) -> bytes:
    """Contents of a .npy 1.0 file."""
    payload = io.BytesIO()
    np.lib.format.write_array(payload, tensor.detach().cpu().contiguous().numpy(), version=(1, 0), allow_pickle=False)
    return payload.getvalue()


def latent_header(suffix: str, payload: bytes) -> tuple[str, tuple[int, ...], int]:
    """(dtype, shape, first byte of the numbers) of a latent member, nothing of which is executed.

    UnreadableSample unless it holds exactly one plain, whole array of a known dtype.
    """
    if suffix.endswith(".npy"):
        start = len(NPY_MAGIC) + 2 + int.from_bytes(payload[8:10], "little")
        parsed = _parse_npy(payload[:start]) if payload.startswith(NPY_MAGIC) and start <= len(payload) else None
    else:
        start = 8 + int.from_bytes(payload[:8], "little")
        parsed = _parse_safetensors(payload[:start]) if 8 < start <= len(payload) else None
    if parsed is None:
        raise UnreadableSample("the payload is not a plain array in a .npy 1.0 or .safetensors file")
    dtype, shape = parsed
    if dtype not in LATENT_DTYPES or min(shape, default=0) < 1:
        raise UnreadableSample(f"the payload is {dtype} {list(shape)}; latents are {', '.join(LATENT_DTYPES)}")
    if start + math.prod(shape) * LATENT_DTYPES[dtype].itemsize != len(payload):
        raise UnreadableSample(f"the payload does not have the length of its {dtype} {list(shape)}")
    return dtype, shape, start


@functools.lru_cache(maxsize=4096)
def _parse_npy(header: bytes) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape in a `.npy` header, None if it is damaged. Cached: grids repeat, and parsing is slow."""
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header[len(NPY_MAGIC) :]))
    except ValueError:
        return None
    return None if fortran_order or dtype.str[0] == ">" or dtype.hasobject else (dtype.name, shape)


@functools.lru_cache(maxsize=4096)
def _parse_safetensors(header: bytes) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape in the header of a `.safetensors` file with the one tensor "latent"; None if it is another."""
    try:
        content = json.loads(header[8:])
        content.pop("__metadata__", None)
        (name, about), names = content.popitem(), {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
        shape = tuple(int(side) for side in about["shape"])
        begins = about["data_offsets"][0] == 0
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    if name != "latent" or content or not begins:
        return None
    return names.get(str(about["dtype"]), str(about["dtype"])), shape
