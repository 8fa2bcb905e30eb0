"""Steps that should not have been: spikes of the loss, and steps that are not finite.

A spike is a loss far above its running mean, for several observations in a row. The detector only says that there is
one; the loop goes back to the weights of a checkpoint from before it, and on with the data that come next (as in PaLM,
arXiv 2204.02311, section 5.1, where spikes did not come again when the data around them were left out).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitscale.files import atomic_write

if TYPE_CHECKING:
    from nitscale.data.index import DatasetIndex
    from nitscale.data.plan import Pack


@dataclass(frozen=True)
class SpikeConfig:
    """When a run goes back to a checkpoint because of its loss. An observation is a line of the log."""

    threshold: float = 0.0
    """Standard deviations above the running mean from which a loss is a spike, e.g. 6; 0 never goes back."""
    patience: int = 3
    """Observations in a row that must be spikes."""
    warmup: int = 100
    """Observations before the first that can be one."""
    memory: int = 100
    """Observations that the running mean and variance are taken over (exponentially weighted)."""
    most_rewinds: int = 3
    """Times that a run goes back; a loss that rises once more is taken as it is."""

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.most_rewinds < 0:
            raise ValueError("threshold and most_rewinds must not be negative")
        if self.patience < 1 or self.warmup < 2 or self.memory < 2:
            raise ValueError("patience must be at least 1, warmup and memory at least 2")


@dataclass(frozen=True)
class SpikeState:
    """What the detector knows."""

    count: int = 0
    """Observations that are in the mean."""
    mean: float = 0.0
    variance: float = 0.0
    above: int = 0
    """Observations in a row, up to the last, that are spikes."""
    began: int | None = None
    """Step of the first of them."""
    rewinds: int = 0


class SpikeDetector:
    """Watches the losses of a run. Pure: the same losses in the same order give the same answers."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.state = SpikeState()

    def observe(self, step: int, loss: float | None) -> int | None:
        """Take in the loss as of `step`. None, or, if the run should go back, the step of the first observation of the
        spike: the weights should be those of a checkpoint before it. A loss that is not finite, or None, is passed
        over: such steps did not move the weights."""
        config, state = self.config, self.state
        if not config.threshold or loss is None or not math.isfinite(loss):
            return None
        exhausted = state.rewinds >= config.most_rewinds
        limit = state.mean + config.threshold * math.sqrt(state.variance)
        if exhausted or state.count < config.warmup or loss <= limit:
            self.state = replace(self._with(loss), above=0, began=None)
            return None
        began = step if state.began is None else state.began
        if state.above + 1 < config.patience:
            self.state = replace(state, above=state.above + 1, began=began)
            return None
        self.state = replace(state, above=0, began=None, rewinds=state.rewinds + 1)
        return began

    def _with(self, loss: float) -> SpikeState:
        """The state with the loss in mean and variance: plain ones at first, then exponentially weighted."""
        state = self.state
        share = 1 / min(state.count + 1, self.config.memory)
        change = loss - state.mean
        variance = (1 - share) * (state.variance + share * change**2)
        return replace(state, count=state.count + 1, mean=state.mean + share * change, variance=variance)

    def state_dict(self) -> dict[str, Any]:
        """A few numbers, for JSON."""
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`: when a run is resumed, not when it goes back because of a spike."""
        self.state = SpikeState(**state)


def write_nonfinite(path: Path, packs: Iterable["Pack"], index: "DatasetIndex") -> None:
    """Write down what steps that were not finite trained on: for every pack its step, its place in it, and its images'
    ids, keys and whether they were mirrored. UserError as `disk_errors`."""
    lines = [
        {
            "step": pack.step,
            "pack": pack.pack,
            "samples": pack.sample_ids.tolist(),
            "keys": index.keys(pack.sample_ids),
            "flips": pack.flips.tolist(),
        }
        for pack in packs
    ]
    atomic_write(path, json.dumps(lines, indent=1).encode())
