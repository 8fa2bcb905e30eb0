"""The gradient noise scale, measured while training: the size of a step, in tokens, up to which larger steps pay.

McCandlish et al., arXiv 1812.06162, appendix A.1: B = tr Σ / |G|², G the true gradient, Σ the covariance of a token's.
A step of k packs gives both from squared norms alone. Pack i has the share pᵢ of the step (Σ pᵢ = 1) and its mean
gradient gᵢ; the step has Σ pᵢ gᵢ = ḡ. With v the variance of ḡ,

    E |gᵢ|² = |G|² + v / pᵢ        E |ḡ|² = |G|² + v        so        E [Σ pᵢ |gᵢ|² - |ḡ|²] = (k - 1) v

For equal packs that is the paper's estimate; for unequal ones the weights pᵢ keep a nearly empty pack, whose gradient
is mostly noise, from outweighing the others. Then tr Σ = v x tokens of the step, |G|² = |ḡ|² - v. Tokens of an image
are not independent; what is measured is the scatter of packs, told in tokens. Both are noisy, and averaged over the
measured steps before they are divided.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nitscale.train.process import Process

KEPT = 0.95
"""Share of the averages that each measured step keeps."""


class NoiseScale:
    """Measures in the steps in which each backward is `watched`; costs nothing in the others."""

    def __init__(self, parameters: Iterable[nn.Parameter], process: Process, gradient_scale: float) -> None:
        """`gradient_scale`: by what a backward's gradients are larger than the pack's share of the step's gradient."""
        self.process = process
        self.gradient_scale = gradient_scale
        self.watching = False
        self.norms: list[Tensor] = []
        """Of the gradients of the present backward, 0-dim each, fp32."""
        self.sum = torch.zeros((), dtype=torch.float64, device=process.device)
        """Of pᵢ |gᵢ|² over this rank's packs since the last reading."""
        self.noise = 0.0
        """Averaged tr Σ …"""
        self.signal = 0.0
        """… and |G|², by the same weights, which do not add up to 1 at first."""
        for parameter in parameters:
            if parameter.requires_grad and counts(parameter, process):
                parameter.register_hook(self._take)

    def _take(self, gradient: Tensor) -> None:
        # A hook of the tensor sees the whole gradient of this backward: before it is added to those of other packs,
        # reduced over ranks, or cut into slices.
        if self.watching:
            self.norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    @contextmanager
    def watch(self, share: float) -> Iterator[None]:
        """Around the backward of a pack that is this share of the step, by tokens or by images, as the loss is."""
        self.watching = True
        try:
            yield
        finally:
            self.watching = False
        # The gradient of the pack's share of the loss is pᵢ gᵢ.
        self.sum += torch.stack(self.norms).double().square().sum() / share
        self.norms.clear()

    def read(self, grad_norm: Tensor, packs: int, step_tokens: int) -> float | None:
        """The noise scale in tokens as of the step just done, all of whose packs were watched; None where a step is one
        pack, or as long as the noise hides the signal.

        `grad_norm`: 0-dim, of the whole step before clipping. All ranks must call it; it waits for the device.
        """
        if self.process.world_size > 1:
            dist.all_reduce(self.sum)
        packs_square, step_square = self.sum.item() / self.gradient_scale**2, grad_norm.item() ** 2
        self.sum.zero_()
        if packs > 1 and math.isfinite(packs_square) and math.isfinite(step_square):
            variance = (packs_square - step_square) / (packs - 1)
            self.noise = KEPT * self.noise + (1 - KEPT) * variance * step_tokens
            self.signal = KEPT * self.signal + (1 - KEPT) * (step_square - variance)
        return self.noise / self.signal if self.signal > 0 else None

    def state(self) -> dict[str, float]:
        """For state.json of a checkpoint."""
        return {"noise": self.noise, "signal": self.signal}

    def load(self, state: dict[str, Any]) -> None:
        self.noise, self.signal = float(state["noise"]), float(state["signal"])


def counts(parameter: Tensor, process: Process) -> bool:
    """Whether this rank counts a parameter in a norm: shards on every tensor rank, whole ones on the first alone."""
    return process.tensor_rank == 0 or bool(getattr(parameter, "tensor_model_parallel", False))
