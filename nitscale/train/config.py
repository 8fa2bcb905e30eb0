"""The configuration of a run: what `nitscale train CONFIG` reads, section by section.

Each component owns its section; those that only the loop needs stand here. `nitscale.config.load_config` reads it.
"""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nitscale.data.manifest import Dataset, Manifest, load_dataset
from nitscale.data.plan import PlanConfig
from nitscale.errors import UserError
from nitscale.models.transformer import ModelConfig
from nitscale.train.ema import EMAConfig
from nitscale.train.engine import EngineConfig, OptimizerConfig
from nitscale.train.faults import FaultsConfig
from nitscale.train.preview import PreviewConfig
from nitscale.train.repa import RepaConfig
from nitscale.train.schedule import ScheduleConfig
from nitscale.train.validation import ValidationConfig


@dataclass(frozen=True)
class DataConfig:
    """Which latents, and how they become packs."""

    path: str
    """Prefix of the dataset that `nitscale encode` wrote: a folder or s3://bucket/prefix."""
    cache: str | None = None
    """Folder on the node's own disk for copies of whole shards. Without one, shards in an object store are kept in the
    folder for temporary files, and those of a file system are read where they are."""
    cache_gb: float = 200.0
    """Most that the cache holds, in 10⁹ bytes; `nitscale data plan` says what a run needs."""
    token_budget: int = 16384
    """Most tokens of a pack. One pack is one micro-batch of one data-parallel rank."""
    packs_per_step: int = 8
    """Packs of one optimizer step over all ranks: data-parallel ranks x accumulation. A multiple of the ranks."""
    packer: Literal["balanced", "lpfhp"] = "balanced"
    """balanced: full packs, and the same work in the packs of a step. lpfhp: longest-pack-first histogram packing
    (arXiv 2107.02027), as published for NiT."""
    lanes: int = 1
    """Independent sample streams; divides packs_per_step, and the data set has at least as many shards."""
    block_samples: int = 65536
    """Samples of a lane that are shuffled and packed together."""
    flip_probability: float = 0.5
    """Chance that an image is taken mirrored."""
    workers: int = 2
    """Loader processes of each rank; 0 reads in the trainer's own process."""

    def open(self) -> Dataset:
        """The dataset, behind a cache of its shards where there is one. UserError as `load_dataset`."""
        dataset = load_dataset(self.path)
        if self.cache is None and "://" not in self.path:
            return dataset
        folder = self.cache or Path(tempfile.gettempdir(), f"nitscale-cache-{os.getuid()}")
        return dataset.cached(folder, int(self.cache_gb * 1e9))

    def plan(self, seed: int, patch_size: int) -> PlanConfig:
        return PlanConfig(
            seed=seed,
            token_budget=self.token_budget,
            packs_per_step=self.packs_per_step,
            lanes=self.lanes,
            block_samples=self.block_samples,
            patch_size=patch_size,
            packer=self.packer,
            flip_probability=self.flip_probability,
        )


@dataclass(frozen=True)
class FlowConfig:
    """The training objective: flow matching on the linear path, velocity prediction."""

    timesteps: Literal["uniform", "logit-normal", "mode"] = "logit-normal"
    """Law of the timesteps; 0 is data, 1 is noise."""
    mean: float = 0.0
    """Of the normal under the logit."""
    std: float = 1.0
    weighting: Literal["token", "image"] = "token"
    """What counts alike in the loss of a step: every token (NiT), or every image (FiT)."""


@dataclass(frozen=True)
class LoopConfig:
    """How long, and what is written when."""

    steps: int
    """Optimizer steps of the whole run."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for ever; 0 keeps none so."""

    def __post_init__(self) -> None:
        if self.keep_every % self.checkpoint_every:
            raise ValueError(f"keep_every={self.keep_every} must be a multiple of checkpoint_every")
        for name in ("steps", "log_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    run: str
    """Folder of checkpoints, metrics and the resolved configuration."""
    data: DataConfig
    model: ModelConfig
    train: LoopConfig
    seed: int = 0
    """Key of every random choice: order, flips, noise, timesteps, label drop, initial weights."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    repa: RepaConfig = field(default_factory=RepaConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)


def check_model_fits_data(config: RunConfig, manifest: Manifest) -> None:
    """UserError where the model's channels or classes are not the dataset's."""
    if config.model.in_channels != manifest.channels:
        raise UserError(
            f"train: model.in_channels={config.model.in_channels}, but the latents of {config.data.path} have "
            f"{manifest.channels} channels; set model.in_channels={manifest.channels}"
        )
    if config.model.num_classes < len(manifest.classes):
        raise UserError(
            f"train: model.num_classes={config.model.num_classes}, but {config.data.path} has {len(manifest.classes)} "
            f"classes; set model.num_classes={len(manifest.classes)}"
        )
