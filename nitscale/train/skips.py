"""Steps that left the weights as they were, because their gradient was not finite: how many in a row.

The count is kept on the device. The host reads it one step late, when the copy has long arrived: reading it at once
would wait for the GPU in every step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Copy:
    value: Tensor
    arrived: Any = None


class SkippedSteps:
    """Counts skipped steps since the last good one. The same on all ranks, as the norm of the gradients is."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.copies = [self._copy()]

    def add(self, finite: Tensor) -> None:
        """Take in a step; `finite`, 0-dim bool: whether it moved the weights."""
        self.in_a_row = torch.where(finite, 0, self.in_a_row + 1)
        self.copies = [self.copies[-1], self._copy()]

    def before_last(self) -> int:
        """The count as of the step before the last one."""
        return self._read(self.copies[0])

    def now(self) -> int:
        """The count as of the last step."""
        return self._read(self.copies[-1])

    def _copy(self) -> _Copy:
        copy = _Copy(self.in_a_row.to("cpu", non_blocking=True))
        if self.on_gpu:
            copy.arrived = torch.cuda.Event()
            copy.arrived.record()
        return copy

    def _read(self, copy: _Copy) -> int:
        if copy.arrived is not None:
            copy.arrived.synchronize()
        return int(copy.value)
