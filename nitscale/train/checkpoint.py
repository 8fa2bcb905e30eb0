"""Checkpoints that are whole or absent.

A checkpoint is written into a hidden staging folder, every file is hashed into its manifest, and one rename publishes
it as `step-NNNNNNNN`; only then may an older one go. `latest` is a hint, written last: resume takes the newest
published checkpoint whose manifest holds. A failed load deletes nothing.

    RUN/checkpoints/step-00001000/
        manifest.json        format, step, world size, ZeRO stage, sha256 and bytes of every file
        state.json           step, tokens, images, data digest, the plan's cursors
        config.yaml          the run's configuration
        ema.safetensors      averaged weights, fp32, whole
        model.json           model configuration, codec and classes: with ema.safetensors all that sampling needs
        engine/              DeepSpeed's files: weights and optimizer state of every rank

Imported weights are a folder of the same kind without `engine/`, `state.json` and `config.yaml`.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from nitscale.errors import UserError
from nitscale.files import atomic_write, disk_errors, publish_folder
from nitscale.train.engine import Engine, Process

FORMAT = 1
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    folder: Path

    @property
    def step(self) -> int:
        return int(self.manifest()["step"])

    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / "manifest.json")

    def state(self) -> dict[str, Any]:
        return read_json(self.folder / "state.json")

    def model(self) -> dict[str, Any]:
        """Model configuration, codec and classes."""
        return read_json(self.folder / "model.json")

    def ema(self) -> dict[str, Tensor]:
        """The averaged weights, fp32, by parameter name."""
        try:
            return load_file(self.folder / "ema.safetensors")
        except Exception as error:
            raise UserError(f"checkpoint: {self.folder / 'ema.safetensors'} cannot be read: {error}") from error

    def verify(self) -> None:
        """UserError that names the first file that is missing or differs from the manifest."""
        for name, expected in self.manifest()["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise UserError(f"checkpoint: {path} is missing or has the wrong size; use an earlier checkpoint")
            if file_sha256(path) != expected["sha256"]:
                raise UserError(f"checkpoint: {path} is damaged (sha256 differs); use an earlier checkpoint")


class Checkpointer:
    """Publishes, finds and retires the checkpoints of one run."""

    def __init__(self, folder: Path, process: Process, keep_last: int) -> None:
        self.folder = folder
        self.process = process
        self.keep_last = keep_last

    def save(self, step: int, engine: Engine, ema: dict[str, Tensor], texts: dict[str, str]) -> Checkpoint:
        """Publish the checkpoint of `step`: engine state, averaged weights, and text files by name. All ranks must call
        it; if one cannot write, all raise UserError."""
        final = self.folder / f"step-{step:08d}"
        staging = self.folder / f".staging-{final.name}"
        with self.together(f"write {staging}"):
            if self.process.is_main:
                with disk_errors(staging):
                    shutil.rmtree(staging, ignore_errors=True)
                    (staging / "engine").mkdir(parents=True)
        with self.together(f"write {staging}"), disk_errors(staging):
            engine.save(staging / "engine")
        with self.together(f"publish {final}"):
            if self.process.is_main:
                with disk_errors(staging):
                    save_file(ema, staging / "ema.safetensors")
                    for name, text in texts.items():
                        (staging / name).write_text(text)
                    world_size = self.process.world_size
                    write_manifest(staging, step=step, world_size=world_size, zero_stage=engine.config.zero_stage)
                if final.exists():  # the same step again, after a resume from an older checkpoint
                    discard(final)
                publish_folder(staging, final)
                atomic_write(self.folder / "latest", final.name.encode())
                self.retire()
        return Checkpoint(final)

    def latest(self) -> Checkpoint | None:
        """The newest published checkpoint whose every file is as its manifest says; damaged ones are named and passed
        over. None if the run has none; UserError if it has some, but no good one."""
        found = published(self.folder)
        for checkpoint in reversed(found):
            try:
                checkpoint.verify()
                return checkpoint
            except UserError as error:
                if self.process.is_main:
                    print(f"{error}")
        if found:
            raise UserError(
                f"checkpoint: none of the {len(found)} checkpoints in {self.folder} is whole; restore one, or start "
                "again in another run folder (nothing was deleted)"
            )
        return None

    def load(self, checkpoint: Checkpoint, engine: Engine) -> None:
        """Weights and optimizer state into the engine. UserError if world size or ZeRO stage differ."""
        manifest = checkpoint.manifest()
        for name, here in (("world_size", self.process.world_size), ("zero_stage", engine.config.zero_stage)):
            if manifest[name] != here:
                raise UserError(
                    f"checkpoint: {checkpoint.folder} was written with {name}={manifest[name]}, this run has "
                    f"{name}={here}; resume with {manifest[name]}"
                )
        engine.load(checkpoint.folder / "engine")

    def retire(self) -> None:
        """Delete all but the newest `keep_last` checkpoints."""
        for checkpoint in published(self.folder)[: -self.keep_last]:
            discard(checkpoint.folder)

    def together(self, purpose: str) -> "Together":
        return Together(self.process, purpose)


class Together:
    """A block that every rank enters; if it fails on one, it fails on all, and none waits for ever."""

    def __init__(self, process: Process, purpose: str) -> None:
        self.process = process
        self.purpose = purpose

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.process.world_size == 1:
            return
        reports: list[str | None] = [None] * self.process.world_size
        dist.all_gather_object(reports, None if error is None else f"rank {self.process.rank}: {error}")
        failed = [report for report in reports if report is not None]
        if failed and error is None:
            raise UserError(f"checkpoint: could not {self.purpose} ({'; '.join(failed)})")


def published(folder: Path) -> list[Checkpoint]:
    """The published checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))
    return [Checkpoint(folder / name) for name in names]


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: itself one, or the newest of a run folder. UserError if there is none."""
    if (path / "manifest.json").is_file() and (path / "ema.safetensors").is_file():
        return Checkpoint(path)
    for folder in (path / "checkpoints", path):
        found = published(folder)
        if found:
            return found[-1]
    raise UserError(f"checkpoint: there is none at {path}; give a run folder or a checkpoints/step-… folder in it")


def write_manifest(folder: Path, **fields: Any) -> None:
    """manifest.json: format, the given fields, and size and sha256 of every file in `folder`."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, **fields, "files": files}, indent=1))


def discard(folder: Path) -> None:
    """Delete a published checkpoint; it stops being one before its first file goes."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint: {path} cannot be read: {error}") from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
