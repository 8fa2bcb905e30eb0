"""Memory and speed of a transformer's blocks: which activations are made again in backward, and compilation."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nitscale.models.transformer import PackedTransformer

Policy = Literal["none", "full", "selective"]
ATTENTION = ("scaled_dot_product", "varlen_attn", "flash_attn")
PRODUCTS = ("aten.mm.", "aten.addmm.")
"""Operations whose results `selective` keeps, by parts of their names."""


def recompute_blocks(model: PackedTransformer, policy: Policy, every: int, tensor_parallel: bool = False) -> None:
    """Blocks keep for backward: all (`none`), their input alone (`full`), or beside it the results of attention and
    matrix products, which are most of the arithmetic (`selective`). Of the blocks 0, `every`, 2 · `every` …, the others
    keep all."""
    if policy == "none":
        return
    kept = ATTENTION if tensor_parallel else ATTENTION + PRODUCTS
    # Megatron sums the product of a row-parallel linear over the ranks in place: kept, it would be summed twice.
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(keep_some, kept))
    for index in range(0, len(model.block_calls), every):
        model.block_calls[index] = partial(recomputed, model.block_calls[index], options)


def recomputed(call: Callable[..., Tensor], options: dict[str, Any], *arguments: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return call(*arguments)
    result: Tensor = checkpoint(call, *arguments, **options)
    return result


def keep_some(kept: tuple[str, ...], context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = str(operation)
    keep = any(part in name for part in kept)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: PackedTransformer) -> None:
    """Compile what is called for each block, for packs of any number of tokens and images."""
    model.block_calls = [torch.compile(call, dynamic=True) for call in model.block_calls]
