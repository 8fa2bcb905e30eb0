"""Exponential moving average of the weights, kept on this rank's part of the fp32 master weights.

ZeRO gives each data-parallel rank a slice of the master weights; the average lives beside that slice: 4 bytes x
parameters / ranks, updated without communication. `state_dict` puts the slices together once, for a checkpoint.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nitscale.train.engine import Engine


@dataclass(frozen=True)
class EMAConfig:
    decay: float = 0.9999
    """Share of the average that is kept at each step."""
    ramp: bool = True
    """Begin with min(decay, (1 + step) / (10 + step)), so that a short run is not dominated by the initial weights."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")


class EMA:
    """The average of an engine's master weights."""

    def __init__(self, engine: Engine, config: EMAConfig) -> None:
        self.engine = engine
        self.config = config
        self.partitions = [master.detach().clone() for master in engine.master_partitions()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0-based)."""
        decay = min(self.config.decay, (1 + step) / (10 + step)) if self.config.ramp else self.config.decay
        masters = [master.detach() for master in self.engine.master_partitions()]
        torch._foreach_lerp_(self.partitions, masters, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Every averaged parameter, fp32, whole, on the CPU of rank 0 (empty elsewhere). All ranks must call it."""
        return self.engine.gather(self.partitions)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this rank's slices from whole parameters, as `state_dict` gives them."""
        self.engine.scatter(state, self.partitions)
