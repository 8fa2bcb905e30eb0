"""Adaptive clipping: a gradient norm far above those of the recent steps is scaled down, whatever their size.

The limit is a multiple of the mean of the norms that earlier steps had after clipping, as in AdaGC (Wang et al., arXiv
2502.11034), here of the global norm and not of each tensor's. Because the clipped norms are averaged, one burst moves
the mean little; because the multiple is above 1, a lasting rise is followed within some steps. AutoClip (arXiv
2007.14469) takes a percentile of all norms so far, ZClip (arXiv 2504.02507) a z-score; both need more state for the
same end. All is computed on 0-dim tensors of the device: no step waits for the host.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdaptiveClipConfig:
    """A limit of the gradient norm that follows the norms of earlier steps."""

    factor: float = 0.0
    """The limit is so many times the mean norm, and never above `optimizer.clip`; 0 switches this off."""
    decay: float = 0.98
    """Share of the mean that is kept at each step."""
    warmup_steps: int = 100
    """Steps at the beginning in which the norms are only averaged."""

    def __post_init__(self) -> None:
        if self.factor != 0 and not 1 < self.factor < math.inf:
            raise ValueError(f"factor must be above 1, or the limit would only ever fall, got {self.factor}; 0 is off")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}")
        if self.warmup_steps < 1:
            raise ValueError(f"warmup_steps must be at least 1, got {self.warmup_steps}")


def clip_state(device: torch.device | str = "cpu") -> Tensor:
    """The state before the first step, (2,) fp32: mean of the clipped norms, and how many were taken in."""
    return torch.zeros(2, device=device)


@torch.no_grad()
def limit_and_update(
    state: Tensor, norm: Tensor, config: AdaptiveClipConfig, ceiling: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The limit of a step whose gradients have the global norm `norm` (0-dim), and the state after it.

    The limit depends on earlier steps alone. `ceiling`: the fixed limit, inf for none. A norm that is not finite, or is
    negative as DeepSpeed's sign of one, is not taken in.
    """
    ceiling = torch.as_tensor(ceiling, dtype=state.dtype, device=state.device)
    if config.factor == 0:
        return ceiling, state
    mean, count = state
    limit = torch.where(count < config.warmup_steps, ceiling, torch.minimum(config.factor * mean, ceiling))
    # The mean of all norms at first, so that the zero it begins with has no weight in it.
    taken = (1 / (count + 1)).clamp(min=1 - config.decay)
    after = torch.stack([mean + taken * (torch.minimum(norm, limit) - mean), count + 1])
    return limit, torch.where(norm.isfinite() & (norm >= 0), after, state)
