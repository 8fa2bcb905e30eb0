"""Tensor parallelism: a transformer whose linears are spread over a group of ranks. The only file of models that
imports Megatron-core.

Attention is cut by heads, MLP and SwiGLU by hidden features, the modulation by its inner features: a column-parallel
linear makes a share of the features on each rank, the row-parallel one after it adds the shares up (Megatron-LM, arXiv
1909.08053 §3). Embeddings and the output stay whole: they are small and each would cost a collective. Names of
parameters do not change, and a rank's shard is a contiguous part of the whole along one dimension (`nitscale.slices`).

Quirks of Megatron-core 0.16, and what is done about them:
- its layers ask torch.cuda for their device, even on CPU, unless `use_cpu_initialization`; weights are made on CPU.
- without `perform_initialization` a weight is not marked `tensor_model_parallel`, by which gradient norms count it.
- a layer returns (output, bias), and adds `_extra_state` to the state dict.
- its mappings add up gradients in place, which autograd may have handed to another branch as well, and lose the sum of
  those that are not contiguous: where it matters, `_AddUpInBackward` stands instead.
- it asks torch.cuda where to put what it gathers along the tokens, and wants its global buffer made.
"""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nitscale.errors import UserError
from nitscale.layout import PackLayout
from nitscale.models.transformer import AdaLN, Attention, Block, GeluMLP, Linear, PackedTransformer, SwiGLU

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Transformer Engine and Apex, which are optional
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
        set_tensor_model_parallel_attributes,
    )
# It recommends CUDA_DEVICE_MAX_CONNECTIONS=1, on CPU too; `nitscale train` sets it.
warnings.filterwarnings("ignore", message="When using (async grad allreduce|sequence parallelism)")


def parallelize(model: PackedTransformer, group: dist.ProcessGroup, sequence_parallel: bool = False) -> None:
    """Replace, in place, the linears of `model` by shards on the ranks of `group`. Weights are not set: call
    `model.initialize` afterwards, which gives every rank its part of the same whole weights.

    With `sequence_parallel`, each rank keeps only its part of the tokens between the linears of the blocks (Korthikanti
    et al., arXiv 2205.05198 §4.2.2): norms, modulations and residuals take a share of the memory, at the same volume of
    communication. UserError if heads, hidden features or width do not divide by the group's size.
    """
    config, size = model.config, group.size()
    for name, count in (("heads", config.heads), ("mlp_width", config.hidden_width), ("width", config.width)):
        if count % size:
            raise UserError(
                f"engine: tensor_parallel={size} does not divide model.{name}={count}; choose a degree that does"
            )
    layers = _Layers(group, sequence_parallel)
    if sequence_parallel:
        model.sequence = TokenSplit(group)
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv, module.out = layers.column(module.qkv), layers.row(module.out)
            layers.add_up_gradients(module.q_norm, module.k_norm)
        elif isinstance(module, GeluMLP):
            module.up, module.out = layers.column(module.up), layers.row(module.out)
        elif isinstance(module, SwiGLU):
            module.gate, module.up, module.out = (
                layers.column(module.gate), layers.column(module.up), layers.row(module.out)
            )  # fmt: skip
        elif isinstance(module, Block):
            parallelize_modulation(module.adaln, layers)
            if sequence_parallel:
                layers.add_up_gradients(module.norm1, module.norm2)
    if model.global_adaln is not None:
        model.global_adaln = layers.modulation(model.global_adaln, whole_input=True)


def parallelize_modulation(adaln: AdaLN, layers: "_Layers") -> None:
    """One linear: by its input features, of which each rank takes its part. Two: by the features between them."""
    if adaln.out.in_features % layers.size:
        raise UserError(
            f"engine: tensor_parallel={layers.size} does not divide the modulation's inner {adaln.out.in_features} "
            "features; choose a degree that does, or change model.adaln_rank"
        )
    adaln.out = layers.modulation(adaln.out, whole_input=adaln.down is None)
    if adaln.down is not None:
        adaln.down = layers.column(adaln.down, of_images=True)
    if adaln.gate is not None:
        adaln.gate = layers.column(adaln.gate, of_images=True)


class _Layers:
    """Makes the parallel form of a linear on one group."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.group, self.size, self.sequence_parallel = group, group.size(), sequence_parallel
        if sequence_parallel:
            if not torch.cuda.is_available():  # Megatron asks it where to put what it gathers
                torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
            if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # which `initialize_model_parallel` would make
                parallel_state._set_global_memory_buffer()

    def config(self, sequence_parallel: bool) -> ModelParallelConfig:
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,
            perform_initialization=False,
        )

    def column(self, linear: Linear, of_images: bool = False) -> Any:
        """Each rank makes its part of the output features, of tokens or of images' conditions."""
        return ColumnLinear(linear, self.group, self.config(self.sequence_parallel and not of_images))

    def row(self, linear: Linear) -> Any:
        """Each rank has its part of the tokens' input features; the output's are whole."""
        layer = RowLinear(linear, self.group, self.config(self.sequence_parallel))
        if self.sequence_parallel and layer.bias is not None:  # added to each rank's tokens
            layer.bias.register_hook(partial(add_up, group=self.group))
        return layer

    def modulation(self, linear: Linear, whole_input: bool) -> Any:
        """A row-parallel linear of images' conditions; of a `whole_input` each rank takes its part."""
        return ModulationLinear(linear, self.group, self.config(False), whole_input, self.sequence_parallel)

    def add_up_gradients(self, *modules: nn.Module) -> None:
        """For parameters that all ranks have, but each uses for its own heads or tokens alone."""
        for module in modules:
            for parameter in module.parameters():
                parameter.register_hook(partial(add_up, group=self.group))


class ColumnLinear(ColumnParallelLinear):
    """Megatron's, with the signature of nn.Linear."""

    def __init__(self, linear: Linear, group: dist.ProcessGroup, config: ModelParallelConfig) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=config,
            init_method=nn.init.zeros_,
            bias=linear.bias is not None,
            tp_group=group,
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state


class RowLinear(RowParallelLinear):
    """Megatron's, with the signature of nn.Linear."""

    def __init__(self, linear: Linear, group: dist.ProcessGroup, config: ModelParallelConfig) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=config,
            init_method=nn.init.zeros_,
            bias=linear.bias is not None,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            x = F.pad(x, (0, 0, 0, -len(x) % self.tp_group.size()))
        return super().forward(x)[0]

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state


class ModulationLinear(RowLinear):
    """Row-parallel, of images' conditions (n, D) and not of tokens."""

    def __init__(
        self,
        linear: Linear,
        group: dist.ProcessGroup,
        config: ModelParallelConfig,
        whole_input: bool,
        read_by_part_of_the_tokens: bool,
    ) -> None:
        super().__init__(linear, group, config)
        self.whole_input, self.read_by_part_of_the_tokens = whole_input, read_by_part_of_the_tokens

    def forward(self, x: Tensor) -> Tensor:
        if self.whole_input:
            # Megatron's own scattering asks torch.cuda for a device in backward. Of a slice the gradient is zero
            # elsewhere, so that the sum over ranks puts the parts together.
            x = _AddUpInBackward.apply(x, self.tp_group)
            x = x.narrow(-1, self.tp_group.rank() * self.input_size_per_partition, self.input_size_per_partition)
        output = super().forward(x)
        if self.read_by_part_of_the_tokens:  # whose gradients must be added up before they go on
            output = _AddUpInBackward.apply(output, self.tp_group)
        return output


class _AddUpInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return add_up(gradients[0], ctx.group), None


def add_up(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of a group, as a new tensor: autograd may hand the same one to others, too."""
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class TokenSplit:
    """Sequence parallelism: the tokens of a pack, rounded up to a multiple of the ranks, in equal contiguous parts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def split(self, x: Tensor, layout: PackLayout) -> tuple[Tensor, PackLayout]:
        """(N, D) → (⌈N / ranks⌉, D), and the layout of this rank's tokens, in which images may have none. The last
        rank's surplus tokens count for the last image; nothing reads them."""
        ranks, rank = self.group.size(), self.group.rank()
        surplus = -len(x) % ranks
        x = scatter_to_sequence_parallel_region(F.pad(x, (0, 0, 0, surplus)), group=self.group)
        first, last = rank * len(x), (rank + 1) * len(x)
        lengths, begin = [], 0
        for i, length in enumerate(layout.lengths):
            end = begin + length + (surplus if i + 1 == layout.num_segments else 0)
            lengths.append(max(0, min(end, last) - max(begin, first)))
            begin = end
        counts = torch.tensor(lengths)
        here = replace(
            layout,
            cu_seqlens=F.pad(counts.cumsum(0), (1, 0)).to(x.device, torch.int32),
            max_seqlen=max(lengths),
            segment_ids=torch.repeat_interleave(counts).to(x.device),
            lengths=tuple(lengths),
        )
        return x, here

    def join(self, x: Tensor, layout: PackLayout) -> Tensor:
        whole = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.group)
        return whole[: layout.num_tokens]
