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
- its all-reduce writes into a copy if the tensor is not contiguous, and returns the original: give it contiguous ones.
"""

import warnings
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from nitscale.errors import UserError
from nitscale.models.transformer import AdaLN, Attention, GeluMLP, Linear, PackedTransformer, SwiGLU

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Transformer Engine and Apex, which are optional
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        set_tensor_model_parallel_attributes,
    )
# It recommends CUDA_DEVICE_MAX_CONNECTIONS=1, on CPU too; `nitscale train` sets it.
warnings.filterwarnings("ignore", message="When using async grad allreduce")


def parallelize(model: PackedTransformer, group: dist.ProcessGroup) -> None:
    """Replace, in place, the linears of `model` by shards on the ranks of `group`. Weights are not set: call
    `model.initialize` afterwards, which gives every rank its part of the same whole weights.

    UserError if heads, hidden features or width do not divide by the group's size.
    """
    config, size = model.config, group.size()
    for name, count in (("heads", config.heads), ("mlp_width", config.hidden_width), ("width", config.width)):
        if count % size:
            raise UserError(
                f"engine: tensor_parallel={size} does not divide model.{name}={count}; choose a degree that does"
            )
    layers = _Layers(group)
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv, module.out = layers.column(module.qkv), layers.row(module.out)
            for parameter in (*module.q_norm.parameters(), *module.k_norm.parameters()):
                parameter.register_hook(layers.add_up)
        elif isinstance(module, GeluMLP):
            module.up, module.out = layers.column(module.up), layers.row(module.out)
        elif isinstance(module, SwiGLU):
            module.gate, module.up, module.out = (
                layers.column(module.gate), layers.column(module.up), layers.row(module.out)
            )  # fmt: skip
        elif isinstance(module, AdaLN):
            parallelize_modulation(module, layers)
    if model.global_adaln is not None:
        model.global_adaln = layers.row(model.global_adaln, whole_input=True)


def parallelize_modulation(adaln: AdaLN, layers: "_Layers") -> None:
    """One linear: by its input features, of which each rank takes its part. Two: by the features between them."""
    if adaln.out.in_features % layers.size:
        return  # an odd rank of a low-rank modulation stays whole
    adaln.out = layers.row(adaln.out, whole_input=adaln.down is None)
    if adaln.down is not None:
        adaln.down = layers.column(adaln.down)
    if adaln.gate is not None:
        adaln.gate = layers.column(adaln.gate)


class _Layers:
    """Makes the parallel form of a linear on one group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, group.size()
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=self.size, use_cpu_initialization=True, perform_initialization=False
        )

    def column(self, linear: Linear) -> Any:
        """Each rank makes its part of the output features."""
        return ColumnLinear(linear, self)

    def row(self, linear: Linear, whole_input: bool = False) -> Any:
        """Each rank has its part of the input features (of a `whole_input` it takes it); the output is whole."""
        return RowLinear(linear, self, whole_input)

    def add_up(self, gradient: Tensor) -> Tensor:
        """The gradient of a parameter that all ranks have, but that each uses for its own heads alone."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=self.group)
        return gradient


class ColumnLinear(ColumnParallelLinear):
    """Megatron's, with the signature of nn.Linear."""

    def __init__(self, linear: Linear, layers: _Layers) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=layers.config,
            init_method=nn.init.zeros_,
            bias=linear.bias is not None,
            tp_group=layers.group,
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state


class RowLinear(RowParallelLinear):
    """Megatron's, with the signature of nn.Linear."""

    def __init__(self, linear: Linear, layers: _Layers, whole_input: bool) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=layers.config,
            init_method=nn.init.zeros_,
            bias=linear.bias is not None,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=layers.group,
        )
        self.whole_input = whole_input
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.whole_input:
            # Megatron's own scattering asks torch.cuda for a device in backward. Of a slice the gradient is zero
            # elsewhere, so that the sum over ranks puts the parts together.
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
            x = x.narrow(-1, self.tp_group.rank() * self.input_size_per_partition, self.input_size_per_partition)
        return super().forward(x)[0]

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state
