"""Attention within the segments of a pack: q, k, v (N, heads, head_dim) and a layout in, (N, heads, head_dim) out.

Backends, chosen by `auto`:
- `flash_attn`: the package of that name, if it is installed; CUDA, half precision.
- `varlen`: `torch.nn.attention.varlen`, the default on CUDA in half precision.
- `sdpa_loop`: scaled_dot_product_attention for each run of consecutive segments of one length; CPU, and full precision
  anywhere. Sort a pack by `group_by_length` first: eleven images of one size are then one call and not eleven.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nitscale.errors import UserError
from nitscale.layout import PackLayout

SHORT = 256
"""Longest segment, in tokens, whose attention on a CPU is written out as two products and a softmax."""
BACKENDS = ("auto", "sdpa_loop", "varlen", "flash_attn")


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax attention of each token to the tokens of its own segment. `scale` is 1 / sqrt(head_dim) by default."""
    backend = choose_backend(q, backend)
    if backend == "sdpa_loop":
        return _sdpa_loop(q, k, v, layout, scale)
    lengths = (layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)
    if backend == "varlen":
        return _varlen()(q, k, v, *lengths, **({} if scale is None else {"scale": scale}))
    return _flash_attn()(q, k, v, *lengths, softmax_scale=scale)


def choose_backend(q: Tensor, backend: str = "auto") -> str:
    """The backend that `attend` uses for these tensors. UserError for one that is unknown or not installed."""
    if backend not in BACKENDS:
        raise UserError(f"attention: backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        half_on_cuda = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        if half_on_cuda and _flash_attn() is not None:
            return "flash_attn"
        return "varlen" if half_on_cuda and _varlen() is not None else "sdpa_loop"
    if backend == "flash_attn" and _flash_attn() is None:
        raise UserError("attention: backend='flash_attn' needs the package flash-attn; use 'varlen' or 'auto'")
    if backend == "varlen" and _varlen() is None:
        raise UserError("attention: backend='varlen' needs torch 2.10 or newer; use 'sdpa_loop' or 'auto'")
    return backend


def group_by_length(layout: PackLayout) -> list[int] | None:
    """The order of segments that puts those of equal length side by side; None where they already are."""
    order = sorted(range(layout.num_segments), key=lambda segment: layout.lengths[segment])
    return None if order == list(range(layout.num_segments)) else order


def equal_length_runs(layout: PackLayout) -> list[tuple[int, int, int]]:
    """(first token, number of segments, length) for each run of consecutive segments of one length."""
    runs: list[tuple[int, int, int]] = []
    first = 0
    for length in layout.lengths:
        if runs and runs[-1][2] == length:
            start, count, _ = runs[-1]
            runs[-1] = (start, count + 1, length)
        else:
            runs.append((first, 1, length))
        first += length
    return runs


@torch.compiler.disable  # it would be compiled anew for every list of lengths
def _sdpa_loop(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, scale: float | None) -> Tensor:
    runs = equal_length_runs(layout)
    # split and not slices: the backward of a slice fills a tensor of the whole pack for every run
    sizes = [count * length for _, count, length in runs]
    outputs = []
    for (_, count, length), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        batch_q, batch_k, batch_v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        softmax_attention = _short_attention if length <= SHORT and not q.is_cuda else F.scaled_dot_product_attention
        attended = softmax_attention(batch_q, batch_k, batch_v, scale=scale)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _short_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    """scaled_dot_product_attention of (images, heads, length, head_dim), written out. torch's fused kernel for CPUs
    slows down 15-fold on short sequences once `torch.set_float32_matmul_precision` is "medium" (torch 2.13)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    images_and_heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q * scale, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).unflatten(0, images_and_heads)


@cache
def _varlen() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def _flash_attn() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func
