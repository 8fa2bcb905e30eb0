"""The only file that imports DeepSpeed: the optimizer step under ZeRO, spread over data and tensor ranks.

DeepSpeed owns gradient reduction, the optimizer step and who keeps which slice of the master weights. What the rest of
nitscale needs of it stands here as plain functions, and its quirks (measured with DeepSpeed 0.19.8) are kept here:

- on CPU, `init_distributed()` tries which ops it could compile, with linker errors on the terminal, and compiles a
  shared-memory op (25 s, needs g++); a table that says that no op is compatible prevents both.
- an optimizer named in DeepSpeed's config compiles `fused_adam`; a torch optimizer is handed over instead.
- it averages gradients over data ranks and divides the loss by the accumulation steps; our loss is normalised by the
  tokens of the whole step, so `backward` multiplies both back.
- at stage 0 in fp32 the engine reports no gradient norm; it is taken before the step here.
- its clipping and its test for gradients that are not finite read the norm on the host, which waits for the GPU; both
  are switched off, and done on the device by the optimizer (stages 1 and 2 in bf16; stage 3 waits all the same).
- it wants an `mpu`, which is global to the process: once one engine had one, every later engine needs one.
- at stage 1 with bf16 it accumulates gradients in bf16, and with fp32 accumulation it becomes another optimizer that
  asserts a positive norm; stages 2 and 3 accumulate in fp32.
- its checkpoints can be read by the same number of ranks only, or after a conversion, and not at all at stage 3; the
  slices are written and read by `nitscale.train.checkpoint` instead, for any number of ranks.
"""

import importlib
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nitscale.errors import UserError
from nitscale.layout import PackLayout
from nitscale.models.recompute import compile_blocks, recompute_blocks
from nitscale.models.transformer import ModelConfig, PackedTransformer
from nitscale.slices import Fragment, shard_of_parameter
from nitscale.train.clipping import AdaptiveClipConfig, clip_state, limit_and_update
from nitscale.train.process import ON_GPU, TIMEOUT, Process

if not ON_GPU:
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for accelerators and warns of finding none
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.ERROR)  # it warns of every skipped step, and of a subclass of AdamW
if not ON_GPU:
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
# DeepSpeed calls collectives by names that torch 2.13 deprecates, once a step.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.01
    """Applied to every parameter, as the published recipes do."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    adaptive_clip: AdaptiveClipConfig = field(default_factory=AdaptiveClipConfig)
    fused: Literal["torch", "apex"] = "torch"
    """Whose kernel: torch's, or FusedAdam of NVIDIA's apex, which must be installed."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.eps <= 0 or self.weight_decay < 0 or self.clip < 0:
            raise ValueError("lr and eps must be positive, weight_decay and clip not negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True)
class EngineConfig:
    """How the optimizer step is spread, in which precision, and what is kept for backward."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 0 replicates everything, 1 shards optimizer state and master weights over the data ranks, 2
    gradients too, 3 the weights too."""
    tensor_parallel: int = 1
    """Ranks over which every linear is spread; divides the heads and the hidden features. Keep it within a node."""
    sequence_parallel: bool = False
    """Spread the tokens between the linears over the tensor ranks, too: less memory, the same communication."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; with bf16 the master weights stay fp32."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """Internal precision of fp32 matrix products (`torch.set_float32_matmul_precision`): TF32 on GPUs, bf16 on CPUs
    that have it. Twice as fast on such machines, no longer exact to fp32."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activations that backward makes again, to save memory: none; full: all of a block; selective: all but the results
    of attention and matrix products."""
    recompute_every: int = 1
    """Of every so many blocks, one is recomputed."""
    compile: bool = False
    """Compile each block with torch.compile: a minute or so at the start, faster steps on GPUs."""

    def __post_init__(self) -> None:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("zero_stage=0 keeps no fp32 master weights for bf16; use zero_stage=1")
        if self.tensor_parallel < 1 or self.recompute_every < 1:
            raise ValueError("tensor_parallel and recompute_every must be at least 1")
        if self.recompute == "selective" and self.zero_stage == 3:
            raise ValueError(
                "recompute=selective does not work with zero_stage=3, which gathers weights inside the blocks; use full"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel=true has no effect with tensor_parallel=1")
        if self.recompute == "none" and self.recompute_every != 1:
            raise ValueError(f"recompute_every={self.recompute_every} has no effect with recompute=none")


def build_engine(
    model: ModelConfig,
    seed: int,
    optimizer: OptimizerConfig,
    config: EngineConfig,
    process: Process,
    accumulation: int,
) -> "Engine":
    """The engine of a freshly initialised model: tensor parallelism, then recomputation, compilation and ZeRO.

    `accumulation`: micro-batches (packs) of a data rank in a step. `process` is already `spread`. UserError for a
    combination that does not work.
    """
    if config.precision == "bf16" and config.zero_stage == 1 and accumulation > 1:
        raise UserError(
            f"engine: zero_stage=1 with bf16 would add up the gradients of {accumulation} packs in bf16 (DeepSpeed "
            "0.19); use zero_stage=2, which adds them up in fp32, or as many packs_per_step as data ranks"
        )
    if optimizer.fused == "apex" and config.zero_stage == 3:
        raise UserError("optimizer: fused=apex counts its steps wrongly under zero_stage=3; use fused=torch")
    torch.set_float32_matmul_precision(config.matmul)
    transformer = PackedTransformer(model, seed=None)
    if process.tensor_size > 1:
        from nitscale.models.parallel import parallelize  # Megatron-core takes a second to import

        parallelize(transformer, process.tensor_group, config.sequence_parallel)
    transformer.initialize(seed, process.tensor_group)
    transformer.to(process.device)
    recompute_blocks(transformer, config.recompute, config.recompute_every, process.tensor_size > 1)
    if config.compile:
        compile_blocks(transformer)
    return Engine(transformer, optimizer, config, process, accumulation)


class Engine:
    """A model with its optimizer, spread over ranks."""

    def __init__(
        self,
        model: PackedTransformer,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        process: Process,
        accumulation: int,
    ) -> None:
        self.config = config
        self.process = process
        self.accumulation = accumulation
        self.optimizer = make_optimizer(optimizer, (p for p in model.parameters() if p.requires_grad))
        self.optimizer.prepare = self._prepare_update
        self.clip = torch.tensor(optimizer.clip or float("inf"), device=process.device)
        self.adaptive_clip = optimizer.adaptive_clip
        self.clip_state = clip_state(process.device)
        """(2,): what adaptive clipping knows of earlier steps; the same on all ranks."""
        self.clip_limit = self.clip
        """0-dim: the norm to which the gradients of the last step were scaled down, if theirs was larger."""
        self.grad_norm = torch.zeros((), device=process.device)
        """0-dim: global gradient norm of the last step, before clipping; inf or NaN if it is not finite."""
        self.finite = torch.ones((), dtype=torch.bool, device=process.device)
        """0-dim: whether the last step moved the weights. It does not if the norm is not finite."""
        self._prepared = False
        bf16 = config.precision == "bf16"
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": config.zero_stage},
            "bf16": {"enabled": True, "check_grad_overflow": False} if bf16 else {"enabled": False},
            "data_types": {"grad_accum_dtype": "bf16" if bf16 and config.zero_stage == 1 else "fp32"},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**12,
        }
        deepspeed.init_distributed(
            dist_backend="nccl" if ON_GPU else "gloo", auto_mpi_discovery=False, verbose=False, timeout=TIMEOUT
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings, mpu=Grid(process), dist_init_required=False
        )
        self.module: PackedTransformer = self.deepspeed.module
        for master in self.masters():
            self.optimizer.make_state(master)

    def forward(
        self, tokens: Tensor, t: Tensor, labels: Tensor, layout: PackLayout, return_features: bool = False
    ) -> Any:
        """The model's velocity, and with `return_features` its features, through DeepSpeed's hooks: under ZeRO 3 all
        data ranks must make the same number of calls."""
        return self.deepspeed(tokens, t, labels, layout, return_features=return_features)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch. `loss` is this pack's share of the loss of the whole step."""
        self.deepspeed.backward(loss * (self.process.data_size * self.accumulation))

    def step(self, lr: float) -> None:
        """After each `backward`; the last one of a step reduces the gradients, clips them and moves the weights, unless
        their norm is not finite: then all ranks leave weights and optimizer as they are."""
        last = self.deepspeed.is_gradient_accumulation_boundary()
        if last and self.config.zero_stage == 0:
            self.grad_norm = total_norm(self.module.parameters(), self.process)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._prepared = False
        self.deepspeed.step()
        if last and not self._prepared:  # DeepSpeed itself left the step out
            self._prepare_update()

    def _prepare_update(self) -> None:
        """Tell the optimizer how to scale the gradients, and whether to move the weights. Once a step, although the
        optimizer is called for every group of parameters."""
        if self._prepared:
            return
        self._prepared = True
        if self.config.zero_stage > 0:
            norm = self.deepspeed.optimizer._global_grad_norm
            self.grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.process.device)
        self.finite = self.grad_norm.isfinite() & (self.grad_norm >= 0)  # DeepSpeed writes -1 for some
        self.clip_limit, self.clip_state = limit_and_update(
            self.clip_state, self.grad_norm, self.adaptive_clip, self.clip
        )
        self.optimizer.divisor = ((self.grad_norm + 1e-6) / self.clip_limit).clamp(min=1.0)
        self.optimizer.finite = self.finite

    def masters(self) -> list[Tensor]:
        """The fp32 master weights that this rank updates: flat slices under ZeRO, whole parameters at stage 0."""
        if self.config.zero_stage == 0:
            return [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if self.config.zero_stage == 3:
            return list(self.deepspeed.optimizer.fp32_partitioned_groups_flat)
        return list(self.deepspeed.optimizer.single_partition_of_fp32_groups)

    def state(self) -> dict[str, list[Tensor]]:
        """All that a step changes, by kind: weight, exp_avg, exp_avg_sq; each a tensor for every one of `masters()`."""
        masters = self.masters()
        moments = {kind: [self.optimizer.state[m][kind] for m in masters] for kind in ("exp_avg", "exp_avg_sq")}
        return {"weight": [master.detach() for master in masters]} | moments

    def fragments(self) -> Iterator[Fragment]:
        """For every parameter that this rank keeps a part of, which part, and where in `masters()` it is."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        if self.config.zero_stage == 3:
            for partition, group in enumerate(self.deepspeed.optimizer.fp16_groups):
                offset = 0
                for parameter in group:
                    length, whole = parameter.partition_numel(), parameter.ds_numel
                    start = min(self.process.data_rank * length, whole)
                    numel = min(length, whole - start)
                    shard = self._shard(parameter)
                    yield Fragment(
                        names[id(parameter)], tuple(parameter.ds_shape), shard, start, numel, partition, offset
                    )
                    offset += length
            return
        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for position, parameter in enumerate(trainable):
            name, shape, shard = names[id(parameter)], tuple(parameter.shape), self._shard(parameter)
            if self.config.zero_stage == 0:
                yield Fragment(name, shape, shard, 0, parameter.numel(), position, 0)
                continue
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Fragment(
                    name, shape, shard, there.start, there.numel, mapping.param_group_index, here.start
                )  # fmt: skip

    def _shard(self, parameter: Tensor) -> Any:
        return shard_of_parameter(parameter, self.process.tensor_rank, self.process.tensor_size)

    @property
    def updates(self) -> int:
        """Optimizer steps that moved the weights: the count of Adam's bias correction."""
        return self.optimizer.updates()

    @torch.no_grad()
    def refresh(self, updates: int) -> None:
        """Take up what was written into the tensors of `state()`: the weights that the model computes with are copied
        from the masters, and the optimizer's count is set. All ranks must call it."""
        self.optimizer.set_updates(updates)
        if self.config.zero_stage in (1, 2):
            self.deepspeed.optimizer.update_lp_params()
        elif self.config.zero_stage == 3:
            optimizer = self.deepspeed.optimizer
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:  # small ones, which every rank keeps whole
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


class Grid:
    """What DeepSpeed asks a Megatron `mpu`. Without `get_sequence_*`, on which it branches by hasattr."""

    def __init__(self, process: Process) -> None:
        everybody = dist.group.WORLD
        data_group = process.data_group or everybody
        data_ranks = dist.get_process_group_ranks(data_group)
        answers = {
            "model_parallel_rank": process.tensor_rank,
            "model_parallel_world_size": process.tensor_size,
            "model_parallel_group": process.tensor_group,
            "tensor_model_parallel_rank": process.tensor_rank,
            "tensor_model_parallel_world_size": process.tensor_size,
            "tensor_model_parallel_group": process.tensor_group,
            "tensor_model_parallel_src_rank": process.rank - process.tensor_rank,
            "data_parallel_rank": process.data_rank,
            "data_parallel_world_size": process.data_size,
            "data_parallel_group": data_group,
            "data_parallel_group_ranks": data_ranks,
        }
        for name, answer in answers.items():
            setattr(self, f"get_{name}", lambda answer=answer: answer)


class GuardedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, which takes both from tensors on the device: by what to divide the gradients, and whether to
    do anything at all."""

    prepare: Any = None
    """Called before an update: sets `divisor` and `finite`."""
    divisor: Tensor
    finite: Tensor

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.prepare()
        self.grad_scale = self.divisor
        self.found_inf = (~self.finite).float()
        super().step()

    def make_state(self, parameter: Tensor) -> None:
        """State as the first step would make it, so that there is one to load into."""
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter.detach()),
            "exp_avg_sq": torch.zeros_like(parameter.detach()),
        }

    def updates(self) -> int:
        return int(next(iter(self.state.values()))["step"])

    def set_updates(self, updates: int) -> None:
        for state in self.state.values():
            state["step"].fill_(updates)


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Any:
    """The optimizer of a configuration, with the methods of `GuardedAdamW`. UserError for apex where it is missing."""
    common: dict[str, Any] = {
        "lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay
    }  # fmt: skip
    if config.fused == "torch":
        return GuardedAdamW(parameters, fused=True, **common)
    try:
        FusedAdam: Any = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"optimizer: fused='apex' needs NVIDIA's apex ({error}); the package of that name on PyPI is another one. "
            "Build it from github.com/NVIDIA/apex, or set optimizer.fused=torch"
        ) from None

    class GuardedFusedAdam(FusedAdam):  # type: ignore[misc]
        """apex's, which knows neither: the gradients are scaled before, and the host looks whether to go on."""

        def step(self, *arguments: Any, **options: Any) -> None:
            self.prepare()
            if not bool(self.finite):
                return
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.divisor)
            super().step(*arguments, **options)

        def make_state(self, parameter: Tensor) -> None:
            self.state[parameter] = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}

        def updates(self) -> int:
            return int(self.param_groups[0].get("step", 0))

        def set_updates(self, updates: int) -> None:
            for group in self.param_groups:
                group["step"] = updates

    return GuardedFusedAdam(parameters, adam_w_mode=True, **common)


def total_norm(parameters: Iterable[nn.Parameter], process: Process) -> Tensor:
    """0-dim: norm of the gradients of all tensor ranks, where parameters that all of them have count once."""
    counted = [
        p.grad
        for p in parameters
        if p.grad is not None and (process.tensor_rank == 0 or getattr(p, "tensor_model_parallel", False))
    ]
    square = torch.stack(torch._foreach_norm(counted)).square().sum()
    if process.tensor_size > 1:
        dist.all_reduce(square, group=process.tensor_group)
    return square.sqrt()
