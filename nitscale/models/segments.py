"""Per-image values read by tokens: adaptive layer norm's modulation and gates, computed once an image.

The published code repeats the conditioning for every token and evaluates a (D, 6 D) linear on each of them. Here the
values stay (n, D); tokens read them through `segment_ids`, and the gradient is summed over each segment. Nothing of
size (N, D) is kept for backward but the tokens themselves.
"""

from typing import Any

import torch
from torch import Tensor

from nitscale.layout import PackLayout
from nitscale.models.attention import equal_length_runs


def modulate(x: Tensor, shift: Tensor, scale: Tensor, layout: PackLayout) -> Tensor:
    """x · (1 + scale) + shift: x (N, D), shift and scale (n, D) of each token's image."""
    return _Modulate.apply(x, shift, scale, layout)


def gated_add(x: Tensor, branch: Tensor, gate: Tensor, layout: PackLayout) -> Tensor:
    """x + gate · branch: x and branch (N, D), gate (n, D) of each token's image."""
    return _GatedAdd.apply(x, branch, gate, layout)


def segment_sum(values: Tensor, layout: PackLayout) -> Tensor:
    """The sum of (N, D) over the tokens of each segment, (n, D), in the same order on every run."""
    if values.is_cuda:  # index_add would sum by atomics, in another order each time
        offsets = layout.cu_seqlens.long()
        return torch.segment_reduce(values.float(), "sum", offsets=offsets, axis=0).to(values.dtype)
    runs = equal_length_runs(layout)
    sums = [
        values[first : first + count * length].unflatten(0, (count, length)).sum(1) for first, count, length in runs
    ]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, layout: PackLayout) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.layout = layout
        ids = layout.segment_ids
        return torch.addcmul(shift.index_select(0, ids), x, (1 + scale).index_select(0, ids))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        (gradient,) = gradients
        to_x = gradient * (1 + scale).index_select(0, ctx.layout.segment_ids) if ctx.needs_input_grad[0] else None
        return to_x, segment_sum(gradient, ctx.layout), segment_sum(gradient * x, ctx.layout), None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, layout: PackLayout) -> Tensor:
        ctx.save_for_backward(branch, gate)
        ctx.layout = layout
        return torch.addcmul(x, branch, gate.index_select(0, layout.segment_ids))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate = ctx.saved_tensors
        (gradient,) = gradients
        to_branch = gradient * gate.index_select(0, ctx.layout.segment_ids)
        return gradient, to_branch, segment_sum(gradient * branch, ctx.layout), None
