"""Learning rate as a pure function of the step and of the tokens seen, so that a resumed run needs no scheduler state.

The rate is `optimizer.lr` x scaling x warm-up x shape. Scaling fits the rate to the size of a step, in tokens: linear
(Goyal et al., arXiv 1706.02677) or, as suits Adam, by the square root (Malladi et al., arXiv 2205.10287, whose rule
moves betas and eps as well; they are left alone here). The warm-up is counted in tokens, which mean the same whatever
the size of a step; the shape is counted in steps, because `train.steps` is how long a run is.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

from nitscale.errors import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    """Shape of the learning rate over a run, as a factor of `optimizer.lr`."""

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    """constant; cosine to `final`; wsd: constant, then linear to `final` over the last `decay_fraction`."""
    warmup_tokens: int = 0
    """Tokens over which the rate rises linearly from 0."""
    final: float = 0.0
    """Factor at the last step, for cosine and wsd."""
    decay_fraction: float = 0.2
    """Share of the run's steps in which wsd decays."""
    scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the rate grows with the tokens of a step (packs_per_step x token_budget): not at all, with them, or with
    their square root."""
    reference_tokens: int | None = None
    """Tokens of a step for which `optimizer.lr` was tuned; needed where `scaling` is not none."""

    def __post_init__(self) -> None:
        if self.warmup_tokens < 0:
            raise ValueError(f"warmup_tokens must not be negative, got {self.warmup_tokens}")
        if self.final < 0:
            raise ValueError(f"final must not be negative, got {self.final}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be in (0, 1], got {self.decay_fraction}")
        if self.kind == "constant" and self.final != ScheduleConfig.final:
            raise ValueError(f"final={self.final} has no effect with kind=constant; choose cosine or wsd")
        if self.kind != "wsd" and self.decay_fraction != ScheduleConfig.decay_fraction:
            raise ValueError(f"decay_fraction={self.decay_fraction} has no effect with kind={self.kind}; choose wsd")
        if self.scaling == "none" and self.reference_tokens is not None:
            raise ValueError(
                f"reference_tokens={self.reference_tokens} has no effect with scaling=none; choose linear or sqrt"
            )
        if self.scaling != "none" and (self.reference_tokens is None or self.reference_tokens < 1):
            raise ValueError(
                f"scaling={self.scaling} needs reference_tokens, the tokens of a step for which optimizer.lr was tuned"
            )


def learning_rate(
    schedule: ScheduleConfig,
    lr: float,
    *,
    step: int,
    steps: int,
    tokens: int,
    step_tokens: int,
    nominal_step_tokens: int,
) -> float:
    """Learning rate of `step` (0-based) of a run of `steps`.

    `tokens`: seen before this step. `step_tokens`: of this step; the warm-up counts them as seen, so that no step has
    the rate 0. `nominal_step_tokens`: packs_per_step x token_budget, by which the rate is scaled; what packs really
    hold varies from step to step.
    """
    peak = lr * scale(schedule, nominal_step_tokens)
    if schedule.warmup_tokens:
        peak *= min(1.0, (tokens + step_tokens) / schedule.warmup_tokens)
    return peak * shape(schedule, step / max(steps - 1, 1))


def scale(schedule: ScheduleConfig, nominal_step_tokens: int) -> float:
    """Factor of the learning rate for steps of so many tokens."""
    if schedule.reference_tokens is None:
        return 1.0
    ratio = nominal_step_tokens / schedule.reference_tokens
    return math.sqrt(ratio) if schedule.scaling == "sqrt" else ratio


def shape(schedule: ScheduleConfig, progress: float) -> float:
    """Factor of the learning rate at `progress`, 0 at the first step and 1 at the last, without warm-up."""
    if schedule.kind == "cosine":
        high = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.kind == "wsd":
        high = min(1.0, (1 - progress) / schedule.decay_fraction)
    else:
        return 1.0
    return schedule.final + (1 - schedule.final) * high


def check_schedule(schedule: ScheduleConfig, steps: int, nominal_step_tokens: int) -> None:
    """UserError for a warm-up that ends within the first step, which is none; a warning of one that outlasts the run,
    as in a short trial of a long run's configuration."""
    if 0 < schedule.warmup_tokens <= nominal_step_tokens:
        raise UserError(
            f"schedule: warmup_tokens={schedule.warmup_tokens:,} has no effect, as the first step has "
            f"{nominal_step_tokens:,} tokens; count tokens and not steps, or set schedule.warmup_tokens=0"
        )
    if schedule.warmup_tokens > steps * nominal_step_tokens:
        warnings.warn(
            f"schedule: warmup_tokens={schedule.warmup_tokens:,} is more than the run's {steps:,} steps of "
            f"{nominal_step_tokens:,} tokens: optimizer.lr is never reached",
            stacklevel=2,
        )
