"""What a checkpoint folder holds, and how it is read: found, verified, opened. Written by `nitscale.train.checkpoint`.

    step-00001000/
        manifest.json        format, step, world size, ZeRO stage, sha256 and bytes of every file
        state.json           step, tokens, images, data digest, the plan's cursors
        config.yaml          the run's configuration
        quarantine.jsonl     images that could not be read up to this step
        ema.safetensors      averaged weights, fp32, whole
        model.json           model configuration, codec and classes: with ema.safetensors all that sampling needs
        engine/              DeepSpeed's files: weights and optimizer state of every rank

Imported weights are a folder of the same kind without `engine/`, `state.json`, `config.yaml` and
`quarantine.jsonl`.
"""

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nitscale.errors import UserError

FORMAT = 1
NAME = re.compile(r"step-(\d{8})")
WEIGHTS = ("ema.safetensors", "model.json")
"""The files that sampling and export read."""


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

    def ema(self) -> dict[str, Tensor]:
        """The averaged weights, fp32, by parameter name."""
        try:
            return load_file(self.folder / "ema.safetensors")
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint: {self.folder / 'ema.safetensors'} cannot be read: {error}") from error

    def verify(self, only: Iterable[str] | None = None) -> None:
        """UserError that names the first file that is missing or differs from the manifest; of all files, or `only`
        of these."""
        files = self.manifest()["files"]
        for name in files if only is None else only:
            path = self.folder / name
            expected = files.get(name, {"bytes": -1})
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise UserError(f"checkpoint: {path} is missing or has the wrong size; use another checkpoint")
            if file_sha256(path) != expected["sha256"]:
                raise UserError(f"checkpoint: {path} is damaged (sha256 differs); use another checkpoint")


def published(folder: Path) -> list[Checkpoint]:
    """The published checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))
    return [Checkpoint(folder / name) for name in names]


def newest_whole(folder: Path, only: Iterable[str] | None = None) -> Checkpoint | None:
    """The newest published checkpoint whose files (all, or `only` these) are as its manifest says; damaged ones are
    named and passed over. None if there is none; UserError if there are some, but no good one."""
    found = published(folder)
    for checkpoint in reversed(found):
        try:
            checkpoint.verify(only)
            return checkpoint
        except UserError as error:
            print(f"{error}; the one before is tried", flush=True)
    if found:
        raise UserError(
            f"checkpoint: none of the {len(found)} checkpoints in {folder} is whole; restore one, or start again in "
            "another run folder (nothing was deleted)"
        )
    return None


def find_weights(path: Path) -> Checkpoint:
    """The checkpoint at `path`, itself one or the newest whole one of a run folder, with its weights verified.
    UserError if there is none."""
    if (path / "manifest.json").is_file() and (path / "ema.safetensors").is_file():
        checkpoint = Checkpoint(path)
        checkpoint.verify(WEIGHTS)
        return checkpoint
    for folder in (path / "checkpoints", path):
        if (found := newest_whole(folder, WEIGHTS)) is not None:
            return found
    raise UserError(f"checkpoint: there is none at {path}; give a run folder or a checkpoints/step-… folder in it")


def write_manifest(folder: Path, **fields: Any) -> None:
    """manifest.json: format, the given fields, and size and sha256 of every file in `folder`."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, **fields, "files": files}, indent=1))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file. OSError where the disk refuses it: safetensors hides the reason in its message."""
    try:
        save_file(dict(tensors), path)
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
