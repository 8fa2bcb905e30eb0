"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """Shape of the learning rate over a run, as a factor of `optimizer.lr`."""

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    """constant; cosine to `final`; wsd: constant, then linear to `final` over the last `decay_fraction`."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    final: float = 0.0
    """Factor at the last step, for cosine and wsd."""
    decay_fraction: float = 0.2
    """Share of the run in which wsd decays."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be in (0, 1], got {self.decay_fraction}")


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Factor of the learning rate at `step` (0-based) of a run of `steps`."""
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    progress = step / max(steps - 1, 1)
    if schedule.kind == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.kind == "wsd":
        shape = min(1.0, (1 - progress) / schedule.decay_fraction)
    else:
        return warmup
    return warmup * (schedule.final + (1 - schedule.final) * shape)
