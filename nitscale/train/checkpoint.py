"""Publishing checkpoints: whole or absent, on all ranks or on none. What is in one: `nitscale.checkpoints`.

A step waits only while its state is copied to host memory; threads write it. Every rank writes and hashes its slices
into a hidden staging folder, rank 0 writes the manifest, and one rename publishes the folder as `step-NNNNNNNN`; only
then may an older one go. `latest` names it for people and is written last: resume takes the newest published checkpoint
whose manifest holds. A failed load deletes nothing.

Slices are cut anew when they are read: a run goes on with any number of data and tensor ranks and any ZeRO stage. With
the same ones, each rank reads its own file, and the run is bit for bit the undisturbed one.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nitscale.checkpoints import Checkpoint, describe_file, none_whole, published, write_manifest, write_tensors
from nitscale.errors import UserError
from nitscale.files import atomic_write, disk_errors, fsync, publish_folder
from nitscale.slices import SliceFiles
from nitscale.train.ema import EMA
from nitscale.train.engine import Engine
from nitscale.train.process import Process


class Checkpointer:
    """Publishes, finds and retires the checkpoints of one run."""

    def __init__(self, folder: Path, process: Process, keep_last: int, keep_every: int = 0) -> None:
        """Keeps the newest `keep_last` checkpoints, and those of steps that are multiples of `keep_every`."""
        self.folder = folder
        self.process = process
        self.keep_last, self.keep_every = keep_last, keep_every
        self.writer_process = process.with_own_control()
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[float] | None = None
        self.buffers: dict[str, Tensor] = {}
        self.stall_s = 0.0
        """Seconds that the step waited for the last save."""
        self.write_s = 0.0
        """Seconds that the last finished save took to write."""

    def save(self, step: int, engine: Engine, ema: EMA, texts: Mapping[str, str]) -> None:
        """Begin to publish the checkpoint of `step`: the engine's state, the averages, and text files by name. All
        ranks must call it. UserError, on all, if the save before could not write."""
        began = time.perf_counter()
        self.wait()
        kinds = engine.state() | ema.state()
        slices = self.copy_to_host(kinds) if engine.config.zero_stage > 0 or self.process.data_rank == 0 else {}
        table = {
            "updates": engine.updates,
            "tensor_rank": self.process.tensor_rank,
            "kinds": list(kinds),
            "fragments": [fragment.to_json() for fragment in engine.fragments()],
        }
        fields = {
            "step": step,
            "world_size": self.process.world_size,
            "tensor_parallel": self.process.tensor_size,
            "zero_stage": engine.config.zero_stage,
            "averages": list(ema.averages),
        }
        self.pending = self.writer.submit(self.write, step, slices, table, dict(texts), fields)
        self.stall_s = time.perf_counter() - began

    def wait(self) -> None:
        """Return when the checkpoint that is being written is published. UserError if it could not be written: on all
        ranks, because what fails on one fails on all."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self.write_s = pending.result()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that was being written could not be."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def copy_to_host(self, kinds: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """Copies in host memory that is kept for the next time, by names as `SliceFiles` reads them."""
        on_gpu = self.process.device.type == "cuda"
        for kind, tensors in kinds.items():
            for position, tensor in enumerate(tensors):
                name = f"{kind}/{position}"
                if name not in self.buffers:
                    self.buffers[name] = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=on_gpu)
                self.buffers[name].copy_(tensor.view(-1), non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return self.buffers

    def write(
        self, step: int, slices: Mapping[str, Tensor], table: dict[str, Any], texts: dict[str, str], fields: Any
    ) -> float:
        """Write and publish; seconds that it took. Runs in a thread of every rank."""
        began = time.perf_counter()
        process = self.writer_process
        final = self.folder / f"step-{step:08d}"
        staging = self.folder / f".staging-{final.name}"
        with process.together(f"write {staging}"), disk_errors(staging):
            if process.is_main:
                self.remove_leftovers()
                (staging / "slices").mkdir(parents=True)
        written: dict[str, dict[str, Any]] = {}
        with process.together(f"write {staging}"), disk_errors(staging):
            if slices:
                name = f"slices/rank-{process.rank:05d}.safetensors"
                write_tensors(staging / name, slices, {"nitscale": json.dumps(table)})
                fsync(staging / name)
                written[name] = describe_file(staging / name)
        all_written = process.gather(written)
        with process.together(f"publish {final}"), disk_errors(staging):
            if process.is_main:
                for name, text in texts.items():
                    (staging / name).write_text(text)
                known = {name: about for part in all_written for name, about in part.items()}
                write_manifest(staging, known, **fields)
                if final.exists():  # the same step again, after a resume from an older checkpoint
                    os.rename(final, self.folder / f".trash-{final.name}")
                publish_folder(staging, final)
                atomic_write(self.folder / "latest", final.name.encode())
                self.retire(step)
        return time.perf_counter() - began

    def latest(self, before: int | None = None) -> Checkpoint | None:
        """The newest whole checkpoint of the run, or of the steps `before` one, the same on all ranks, each of which
        checks its share of the files; None if the run has none, UserError if it has some but none is whole. All ranks
        must call it."""
        names = self.process.decide(lambda: [checkpoint.folder.name for checkpoint in reversed(published(self.folder))])
        for name in names:
            checkpoint = Checkpoint(self.folder / name)
            if before is not None and step_of(name) >= before:
                continue
            damage = None
            try:
                checkpoint.verify(share=(self.process.rank, self.process.world_size))
            except UserError as error:
                damage = error
                print(f"{error}; the one before is tried", flush=True)
            if not self.process.any_rank(damage is not None):
                return checkpoint
        if names and before is None:
            raise none_whole(self.folder, len(names))
        return None

    def load(self, checkpoint: Checkpoint, engine: Engine, ema: EMA) -> None:
        """Weights, optimizer state and averages, from any number of ranks at any ZeRO stage. All ranks must call it.
        UserError if a parameter is missing."""
        with self.process.together(f"load {checkpoint.folder}"):
            folder = checkpoint.folder / "slices"
            own = folder / f"rank-{self.process.rank:05d}.safetensors"
            files = SliceFiles(folder, [own]) if own.exists() else SliceFiles(folder)
            complete = not own.exists()
            kinds = engine.state() | ema.state()
            for fragment in engine.fragments():
                for kind, partitions in kinds.items():
                    kept = kind if kind in files.kinds else "weight"  # an average that begins now
                    values = files.read(kept, fragment)
                    if values is None and not complete:  # other ranks have it: look at all files
                        files, complete = SliceFiles(folder), True
                        values = files.read(kept, fragment)
                    if values is None:
                        whole = files.whole(kept, fragment.name)
                        if whole.shape != fragment.whole_shape:
                            raise UserError(
                                f"checkpoint: parameter '{fragment.name}' should be {fragment.whole_shape}, the "
                                f"checkpoint has {tuple(whole.shape)}; resume with the configuration that wrote it"
                            )
                        part = whole if fragment.shard is None else fragment.shard.of(whole)
                        values = part.reshape(-1)[fragment.start : fragment.start + fragment.numel]
                    target = partitions[fragment.partition].view(-1)
                    target[fragment.offset : fragment.offset + fragment.numel] = values
        engine.refresh(files.updates)

    def retire(self, step: int) -> None:
        """Delete what need not be kept of the checkpoints up to that of `step`. Later ones can only be damaged ones
        that resume passed over: they stay, and are replaced when their step comes again."""
        older = [checkpoint for checkpoint in published(self.folder) if checkpoint.folder.name <= f"step-{step:08d}"]
        for checkpoint in older[: -self.keep_last]:
            if self.keep_every and step_of(checkpoint.folder.name) % self.keep_every == 0:
                continue
            os.rename(checkpoint.folder, self.folder / f".trash-{checkpoint.folder.name}")
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Delete what killed runs left: stagings that were never published, and what was about to be deleted."""
        for pattern in (".staging-*", ".trash-*"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def step_of(name: str) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(name.removeprefix("step-"))
