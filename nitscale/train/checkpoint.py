"""Publishing checkpoints: whole or absent, on all ranks or on none. What is in one: `nitscale.checkpoints`.

A checkpoint is written into a hidden staging folder, every file is hashed into its manifest, and one rename publishes
it as `step-NNNNNNNN`; only then may an older one go. `latest` names it for people and is written last: resume takes the
newest published checkpoint whose manifest holds. A failed load deletes nothing.
"""

import os
import shutil
from pathlib import Path

from torch import Tensor

from nitscale.checkpoints import Checkpoint, newest_whole, published, write_manifest, write_tensors
from nitscale.errors import UserError
from nitscale.files import atomic_write, disk_errors, publish_folder
from nitscale.train.engine import Engine, Process


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
        with self.process.together(f"write {staging}"), disk_errors(staging):
            if self.process.is_main:
                self.remove_leftovers()
                (staging / "engine").mkdir(parents=True)
        with self.process.together(f"write {staging}"), disk_errors(staging):
            engine.save(staging / "engine")
        with self.process.together(f"publish {final}"), disk_errors(staging):
            if self.process.is_main:
                write_tensors(staging / "ema.safetensors", ema)
                for name, text in texts.items():
                    (staging / name).write_text(text)
                write_manifest(
                    staging, step=step, world_size=self.process.world_size, zero_stage=engine.config.zero_stage
                )
                if final.exists():  # the same step again, after a resume from an older checkpoint
                    os.rename(final, self.folder / f".trash-{final.name}")
                publish_folder(staging, final)
                atomic_write(self.folder / "latest", final.name.encode())
                self.retire(step)
        return Checkpoint(final)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint of the run, the same on all ranks; None if it has none, UserError if it has some
        but none is whole. All ranks must call it."""

        def find() -> str | None:
            found = newest_whole(self.folder)
            return found.folder.name if found else None

        name = self.process.decide(find)
        return Checkpoint(self.folder / name) if name is not None else None

    def load(self, checkpoint: Checkpoint, engine: Engine) -> None:
        """Weights and optimizer state into the engine. UserError if the ZeRO stage differs, or, where state is sharded,
        the world size."""
        manifest = checkpoint.manifest()
        here: dict[str, int] = {"zero_stage": engine.config.zero_stage}
        if engine.config.zero_stage > 0:
            here["world_size"] = self.process.world_size
        for name, value in here.items():
            if manifest[name] != value:
                raise UserError(
                    f"checkpoint: {checkpoint.folder} was written with {name}={manifest[name]}, this run has "
                    f"{name}={value}; resume with {manifest[name]}"
                )
        engine.load(checkpoint.folder / "engine")

    def retire(self, step: int) -> None:
        """Delete all but the newest `keep_last` checkpoints up to that of `step`. Later ones can only be damaged ones
        that resume passed over: they stay, and are replaced when their step comes again."""
        older = [checkpoint for checkpoint in published(self.folder) if checkpoint.folder.name <= f"step-{step:08d}"]
        for checkpoint in older[: -self.keep_last]:
            os.rename(checkpoint.folder, self.folder / f".trash-{checkpoint.folder.name}")
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Delete what killed runs left: stagings that were never published, and what was about to be deleted."""
        for pattern in (".staging-*", ".trash-*"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
