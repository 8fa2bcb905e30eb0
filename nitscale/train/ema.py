"""Averages of the weights over training, kept on this rank's part of the fp32 master weights.

ZeRO gives each data rank a slice of the master weights; the averages live beside that slice: 4 bytes x parameters /
(data x tensor ranks) for each, updated without communication. Checkpoints hold them slice by slice, as the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nitscale.train.averages import decay_at, make_profiles
from nitscale.train.engine import Engine


@dataclass(frozen=True)
class EMAConfig:
    decays: tuple[float, ...] = (0.9999,)
    """Shares of the exponential averages that are kept at each step. Samples are drawn from the first average."""
    powers: tuple[float, ...] = ()
    """Relative widths σ_rel of power-function averages (EDM2, arXiv 2312.02696), e.g. 0.05: their memory grows with the
    run, and averages of other widths can be made of two of them afterwards."""
    ramp: bool = True
    """Begin with min(decay, (1 + step) / (10 + step)), so that a short run is not dominated by the initial weights."""

    def __post_init__(self) -> None:
        if not (self.decays or self.powers):
            raise ValueError("decays and powers are both empty; samples are drawn from an average")
        make_profiles(self.decays, self.powers)  # refuses what is out of range


class EMA:
    """The averages of an engine's master weights, by name."""

    def __init__(self, engine: Engine, config: EMAConfig) -> None:
        self.engine = engine
        self.profiles = make_profiles(config.decays, config.powers, config.ramp)
        self.averages = {p.name: [m.detach().clone() for m in engine.masters()] for p in self.profiles}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0-based), unless the step left them as they were."""
        for profile in self.profiles:
            taken = (
                1 - decay_at(profile, step)
            ) * self.engine.finite.float()  # a tensor, so that the host need not know
            for mean, master in zip(self.averages[profile.name], self.engine.masters(), strict=True):
                mean.lerp_(master.detach(), taken)

    def state(self) -> dict[str, list[Tensor]]:
        """The averages by kind of checkpoint slices: a tensor for every one of the engine's `masters()`."""
        return {f"ema/{name}": average for name, average in self.averages.items()}
