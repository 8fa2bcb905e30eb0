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
    apply = _Modulate.apply if x.is_cuda else _modulate_eagerly
    return apply(x, shift.to(x.dtype), scale.to(x.dtype), layout)


def gated_add(x: Tensor, branch: Tensor, gate: Tensor, layout: PackLayout) -> Tensor:
    """x + gate · branch: x and branch (N, D), gate (n, D) of each token's image."""
    apply = _GatedAdd.apply if x.is_cuda else _gated_add_eagerly
    return apply(x, branch.to(x.dtype), gate.to(x.dtype), layout)


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
        factor = 1 + scale
        ctx.save_for_backward(x, factor)
        ctx.layout = layout
        return _multiply_add(x, factor, shift, layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        (gradient,) = gradients
        to_x = _multiply_add(gradient, factor, None, ctx.layout)
        return to_x, segment_sum(gradient, ctx.layout), segment_sum(gradient * x, ctx.layout), None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, layout: PackLayout) -> Tensor:
        ctx.save_for_backward(branch, gate)
        ctx.layout = layout
        return _multiply_add(branch, gate, x, layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate = ctx.saved_tensors
        (gradient,) = gradients
        to_branch = _multiply_add(gradient, gate, None, ctx.layout)
        return gradient, to_branch, segment_sum(gradient * branch, ctx.layout), None


def _multiply_add(x: Tensor, factor: Tensor, addend: Tensor | None, layout: PackLayout) -> Tensor:
    """x · factor + addend: x (N, D), factor (n, D), addend (n, D) or (N, D) or none."""
    if x.device.type != "cpu":
        factor = factor.index_select(0, layout.segment_ids)
        if addend is None:
            return x * factor
        return torch.addcmul(addend if len(addend) == len(x) else addend.index_select(0, layout.segment_ids), x, factor)
    # By runs of equal lengths the values of an image are broadcast, not copied to its tokens: a tenth of the time.
    out = torch.empty_like(x)
    segment = 0
    for first, count, length in equal_length_runs(layout):
        tokens, images = slice(first, first + count * length), slice(segment, segment + count)
        run, written = (tensor[tokens].unflatten(0, (count, length)) for tensor in (x, out))
        of_run = factor[images, None]
        if addend is None:
            torch.mul(run, of_run, out=written)
        elif len(addend) == len(x):
            torch.addcmul(addend[tokens].unflatten(0, (count, length)), run, of_run, out=written)
        else:
            torch.addcmul(addend[images, None], run, of_run, out=written)
        segment += count
    return out


# On a CPU these loop over runs of equal lengths, and would be compiled anew for every list of lengths.
_modulate_eagerly = torch.compiler.disable(_Modulate.apply)
_gated_add_eagerly = torch.compiler.disable(_GatedAdd.apply)
