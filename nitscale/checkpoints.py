"""What a checkpoint folder holds, and how it is read: found, verified, opened. Written by `nitscale.train.checkpoint`.

    step-00001000/
        manifest.json        format, step, ranks, ZeRO stage, averages, sha256 and bytes of every file
        state.json           step, tokens, images, data digest, the plan's cursors
        config.yaml          the run's configuration
        quarantine.jsonl     images that could not be read up to this step
        model.json           model configuration, codec and classes: with the weights all that sampling needs
        slices/              what each rank keeps of fp32 weights, Adam's moments and averages (`nitscale.slices`)

Imported and consolidated weights are a folder of the same kind with model.json, manifest.json and whole weights:

        ema.safetensors      averaged weights, fp32
"""

import errno
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from nitscale.errors import UserError
from nitscale.slices import SliceFiles

FORMAT = 2
NAME = re.compile(r"step-(\d{8})")


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint is one of those that sampling and export read."""
    return name in ("ema.safetensors", "model.json") or name.startswith("slices/")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    folder: Path

    @property
    def step(self) -> int:
        return int(self.manifest()["step"])

    def manifest(self) -> dict[str, Any]:
        """manifest.json. UserError if it is damaged or of another format."""
        manifest = read_json(self.folder / "manifest.json")
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            raise UserError(f"checkpoint: {self.folder / 'manifest.json'} is damaged; use another checkpoint")
        if manifest.get("format") != FORMAT:
            found = manifest.get("format")
            raise UserError(f"checkpoint: {self.folder} has format {found!r}, this build reads {FORMAT}")
        return manifest

    def state(self) -> dict[str, Any]:
        """Step, counters, data digest and the plan's cursors."""
        return read_json(self.folder / "state.json")

    def model(self) -> dict[str, Any]:
        """Model configuration, codec and classes."""
        return read_json(self.folder / "model.json")

    def averages(self) -> list[str]:
        """Names of the averages of the weights; the first is the one to sample from."""
        return list(self.manifest().get("averages", []))

    def weights(self, which: str | None = None) -> dict[str, Tensor]:
        """Whole weights, fp32, by parameter name: an average by its name (the first by default), or "model", those that
        training goes on with. UserError if there are none of that name."""
        if (self.folder / "ema.safetensors").exists():
            if which not in (None, "ema"):
                raise UserError(f"checkpoint: {self.folder} has averaged weights only, not '{which}'; leave it out")
            return load_tensors(self.folder / "ema.safetensors")
        averages = self.averages()
        which = averages[0] if which in (None, "ema") else which
        if which not in (*averages, "model"):
            raise UserError(
                f"checkpoint: {self.folder} has no weights '{which}'; choose {', '.join(averages)} or model"
            )
        slices = SliceFiles(self.folder / "slices")
        kind = "weight" if which == "model" else f"ema/{which}"
        return {name: slices.whole(kind, name) for name in slices.parts}

    def verify(self, only: Callable[[str], bool] | None = None, share: tuple[int, int] = (0, 1)) -> None:
        """UserError that names the first file that is missing or differs from the manifest; of all files, or those for
        whose name `only` holds, and of these, with `share` (k, n), of every n-th from the k-th on."""
        files = self.manifest()["files"]
        names = [name for name in sorted(files) if only is None or only(name)][share[0] :: share[1]]
        with tqdm(
            total=sum(files[name]["bytes"] for name in names),
            desc="verify",
            unit="B",
            unit_scale=True,
            delay=3,
            disable=share[0] > 0,
        ) as bar:
            for name in names:
                path, expected = self.folder / name, files[name]
                if not path.is_file() or path.stat().st_size != expected["bytes"]:
                    raise UserError(f"checkpoint: {path} is missing or has the wrong size; use another checkpoint")
                if file_sha256(path) != expected["sha256"]:
                    raise UserError(f"checkpoint: {path} is damaged (sha256 differs); use another checkpoint")
                bar.update(expected["bytes"])


def published(folder: Path) -> list[Checkpoint]:
    """The published checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))
    return [Checkpoint(folder / name) for name in names]


def newest_whole(folder: Path, only: Callable[[str], bool] | None = None) -> Checkpoint | None:
    """The newest published checkpoint whose files (or those for which `only` holds) are as its manifest says; damaged
    ones are named and passed over. None if there is none; UserError if there are some, but no good one."""
    found = published(folder)
    for checkpoint in reversed(found):
        try:
            checkpoint.verify(only)
            return checkpoint
        except UserError as error:
            print(f"{error}; the one before is tried", flush=True)
    if found:
        raise none_whole(folder, len(found))
    return None


def none_whole(folder: Path, count: int) -> UserError:
    return UserError(
        f"checkpoint: none of the {count} checkpoints in {folder} is whole; restore one, or start again in another run "
        "folder (nothing was deleted)"
    )


def find_weights(path: Path) -> Checkpoint:
    """The checkpoint at `path`, itself one or the newest whole one of a run folder, with its weights verified.
    UserError if there is none."""
    if (path / "manifest.json").is_file() and (path / "model.json").is_file():
        checkpoint = Checkpoint(path)
        checkpoint.verify(is_weights)
        return checkpoint
    for folder in (path / "checkpoints", path):
        if (found := newest_whole(folder, is_weights)) is not None:
            return found
    raise UserError(f"checkpoint: there is none at {path}; give a run folder or a checkpoints/step-… folder in it")


def write_manifest(folder: Path, known: Mapping[str, dict[str, Any]] | None = None, **fields: Any) -> None:
    """manifest.json: format, the given fields, and size and sha256 of every file in `folder`, as far as they are not
    `known`."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    files = dict(known or {})
    files |= {name: describe_file(folder / name) for name in names if name not in files}
    text = json.dumps({"format": FORMAT, **fields, "files": dict(sorted(files.items()))}, indent=1)
    (folder / "manifest.json").write_text(text)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as a manifest has them."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. UserError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint: {path} cannot be read: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. OSError where the disk refuses it: safetensors hides the reason in its message."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint: {path} cannot be read: {error}") from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
