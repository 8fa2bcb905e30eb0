"""Which part of a parameter a rank keeps: a tensor-parallel shard, and of that, flattened, a range of elements.

Checkpoints are written as such parts, and put together, or cut anew, for any number of ranks when they are read.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nitscale.errors import UserError


@dataclass(frozen=True)
class Shard:
    """A contiguous part of a whole tensor along one dimension."""

    dim: int
    rank: int
    size: int
    """Number of shards."""

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole, given a shard's."""
        return tuple(n * self.size if i == self.dim else n for i, n in enumerate(shape))

    def of(self, whole: Tensor) -> Tensor:
        """This shard of a whole tensor: a view."""
        length = whole.shape[self.dim] // self.size
        return whole.narrow(self.dim, self.rank * length, length)


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that a rank keeps."""

    name: str
    shape: tuple[int, ...]
    """Of the rank's shard; of the whole parameter where there are no shards."""
    shard: Shard | None
    start: int
    """First element of the flattened shard that is kept here."""
    numel: int
    """Elements kept here; may be 0."""
    partition: int
    """Which of the rank's flat partitions holds them."""
    offset: int
    """Where in that partition they begin."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return self.shape if self.shard is None else self.shard.whole_shape(self.shape)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Fragment":
        shard = fields["shard"]
        return cls(**fields | {"shape": tuple(fields["shape"]), "shard": shard and Shard(**shard)})


def shard_of_parameter(parameter: Tensor, rank: int, size: int) -> Shard | None:
    """The shard that a parameter is, by the marks that Megatron sets; None for a whole one."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Shard(int(parameter.partition_dim), rank, size)  # type: ignore[attr-defined]


class SliceFiles:
    """The slices of a checkpoint: one safetensors file a rank, with the table of its fragments in the header.

    A file's tensors are named KIND/PARTITION: weight/0, exp_avg/0, exp_avg_sq/0, ema/0.9999/0.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        """`files`: only these of the folder. UserError if one cannot be read."""
        self.folder = folder
        self._opened: dict[Path, Any] = {}
        self.parts: dict[str, list[tuple[Path, Fragment]]] = {}
        self.kinds: list[str] = []
        self.updates = 0
        """Optimizer steps taken."""
        files = sorted(folder.glob("rank-*.safetensors")) if files is None else files
        for path in files:
            about = self._about(path)
            self.updates = about["updates"]
            self.kinds = about["kinds"]
            for fields in about["fragments"]:
                fragment = Fragment.from_json(fields)
                if fragment.shard is None and about["tensor_rank"] > 0 and len(files) > 1:
                    continue  # every tensor rank has it
                self.parts.setdefault(fragment.name, []).append((path, fragment))
        if not self.parts:
            raise UserError(f"checkpoint: {folder} has no slices of weights; use another checkpoint")

    def read(self, kind: str, wanted: Fragment) -> Tensor | None:
        """(numel,): the elements of a fragment, from whichever files have them. None if some are in none of them."""
        out = torch.empty(wanted.numel)
        end, found = wanted.start + wanted.numel, 0
        for path, part in self.parts.get(wanted.name, []):
            if part.shard != wanted.shard or part.shape != wanted.shape:
                continue
            first, last = max(wanted.start, part.start), min(end, part.start + part.numel)
            if first < last:
                begin = part.offset + first - part.start
                out[first - wanted.start : last - wanted.start] = self._open(path).get_slice(
                    f"{kind}/{part.partition}"
                )[begin : begin + last - first]
                found += last - first
        return out if found == wanted.numel else None

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole parameter. UserError if elements of it are in no file."""
        shards = {part.shard: part for _, part in self.parts.get(name, [])}
        first = next(iter(shards.values()), None)
        whole = torch.empty(first.whole_shape if first else ())
        for shard, part in shards.items():
            flat = self.read(kind, replace(part, start=0, numel=math.prod(part.shape)))
            if flat is None or (shard is not None and len(shards) != shard.size):
                first = None
                break
            (whole if shard is None else shard.of(whole)).copy_(flat.view(part.shape))
        if first is None:
            raise UserError(f"checkpoint: {self.folder} lacks a part of '{name}'; use another checkpoint")
        return whole

    def _open(self, path: Path) -> Any:
        try:
            if path not in self._opened:
                self._opened[path] = safe_open(path, "pt")
            return self._opened[path]
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint: {path} cannot be read: {error}") from error

    def _about(self, path: Path) -> dict[str, Any]:
        try:
            about: dict[str, Any] = json.loads(self._open(path).metadata()["nitscale"])
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"checkpoint: {path} has no table of fragments ({error!r})") from error
        return about
