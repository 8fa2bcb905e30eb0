"""The only file that imports DeepSpeed: processes, the optimizer step under ZeRO, and the slices of its master weights.

DeepSpeed owns gradient reduction, clipping, the optimizer step and its checkpoint files. What the rest of nitscale
needs of it stands here as plain functions, and its quirks (measured with DeepSpeed 0.19.8) are kept here:

- on CPU, `init_distributed()` tries which ops it could compile, with linker errors on the terminal, and compiles a
  shared-memory op (25 s, needs g++); a table that says that no op is compatible prevents both.
- an optimizer named in DeepSpeed's config compiles `fused_adam`; `torch.optim.AdamW` is handed over instead.
- DeepSpeed averages gradients over data-parallel ranks and divides the loss by the accumulation steps; our loss is
  normalised by the tokens of the whole step, so `backward` multiplies both back.
- at stage 0 in fp32 the engine reports no gradient norm; it is taken before the step here.
"""

import errno
import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nitscale.errors import UserError
from nitscale.layout import PackLayout

ON_GPU = torch.cuda.is_available() and os.environ.get("NITSCALE_DEVICE") != "cpu"
"""Whether training runs on GPUs: where there are some, unless NITSCALE_DEVICE=cpu."""
if not ON_GPU:
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for accelerators and warns of finding none
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.WARNING)
T = TypeVar("T")
TIMEOUT = timedelta(hours=1)
"""Longest wait in a collective: rank 0 hashes and publishes a checkpoint while its peers wait."""
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

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.eps <= 0 or self.weight_decay < 0 or self.clip < 0:
            raise ValueError("lr and eps must be positive, weight_decay and clip not negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True)
class EngineConfig:
    """How the optimizer step is spread, and in which precision."""

    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed ZeRO: 0 replicates everything, 1 shards optimizer state and master weights, 2 gradients too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; with bf16 the master weights stay fp32."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """Internal precision of fp32 matrix products (`torch.set_float32_matmul_precision`): TF32 on GPUs, bf16 on CPUs
    that have it. Twice as fast on such machines, no longer exact to fp32."""

    def __post_init__(self) -> None:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("zero_stage=0 keeps no fp32 master weights for bf16; use zero_stage=1")


@dataclass(frozen=True)
class Process:
    """Where this process stands among those of the run."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = None
    """Group for small messages between hosts, which must not wait for the GPU; None is the default group."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def together(self, purpose: str) -> Iterator[None]:
        """A block that every rank enters: if it fails on one, it fails on all, and none waits for ever."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.world_size > 1:
            reports: list[str | None] = [None] * self.world_size
            dist.all_gather_object(reports, None if failure is None else str(failure), group=self.control)
            failed = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None]
            if failed and failure is None:
                raise UserError(f"could not {purpose} ({'; '.join(failed)})")
        if failure is not None:
            raise failure

    def decide(self, choose: Callable[[], T]) -> T:
        """What rank 0 chooses, on every rank; its error too."""
        choice: list[Any] = [None]
        with self.together("go on without rank 0"):
            if self.is_main:
                choice[0] = choose()
        if self.world_size > 1:
            dist.broadcast_object_list(choice, src=0, group=self.control)
        return choice[0]

    def any_rank(self, condition: bool) -> bool:
        """Whether the condition holds on some rank; the same answer on all."""
        if self.world_size == 1:
            return condition
        flag = torch.tensor(condition, dtype=torch.int32)
        if self.control is None:
            flag = flag.to(self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.control)
        return bool(flag.item())


def start_process() -> Process:
    """Join the processes that torchrun started, or form a group of one. Idempotent."""
    alone = "RANK" not in os.environ
    if alone and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("train: srun started several tasks, but no RANK is set; start torchrun, one task a node")
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if ON_GPU and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"train: LOCAL_RANK={local_rank}, but there are {torch.cuda.device_count()} GPUs; start fewer ranks"
        )
    device = torch.device("cuda", local_rank) if ON_GPU else torch.device("cpu")
    if ON_GPU:
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    backend = "nccl" if ON_GPU else "gloo"
    if not dist.is_initialized():
        # A group of one needs no port; with `RANK` and the like in the environment, child processes would think that
        # they belong to it.
        one: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        dist.init_process_group(backend, timeout=TIMEOUT, **one)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if ON_GPU and dist.get_world_size() > 1 else None
    return Process(dist.get_rank(), dist.get_world_size(), device, control)


def leave_process() -> NoReturn:
    """End this process, exit code 0, when all ranks are here: the end of `start_process`.

    Not by the interpreter's own end: with gloo (torch 2.13) one exit in ten aborted there with "terminate called
    without an active exception", which a launcher takes for a failed rank.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter's fp32 master weights that this rank keeps."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    start: int
    """First element of the flattened parameter that is kept here."""
    numel: int
    """Elements kept here; may be 0."""
    partition: int
    """Which of `Engine.master_partitions()` holds them."""
    offset: int
    """Where in that (flattened) partition they begin."""


class Engine:
    """A model with its optimizer, spread over data-parallel ranks by ZeRO."""

    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig, config: EngineConfig, process: Process, accumulation: int
    ) -> None:
        """`accumulation`: micro-batches (packs) of this rank in a step."""
        torch.set_float32_matmul_precision(config.matmul)
        self.config = config
        self.process = process
        self.accumulation = accumulation
        self.optimizer = optimizer
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adamw = torch.optim.AdamW(
            parameters,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optimizer.clip,
            "zero_optimization": {"stage": config.zero_stage},
            "bf16": {"enabled": config.precision == "bf16"},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**12,
        }
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=adamw, config=settings, dist_init_required=False
        )
        self.module: nn.Module = self.deepspeed.module
        self._grad_norm: Tensor | float | None = None

    def forward(self, tokens: Tensor, t: Tensor, labels: Tensor, layout: PackLayout) -> Tensor:
        """The model's velocity, through DeepSpeed's hooks."""
        return self.deepspeed(tokens, t, labels, layout)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch. `loss` is this pack's share of the loss of the whole step."""
        self.deepspeed.backward(loss * (self.process.world_size * self.accumulation))

    def step(self, lr: float) -> None:
        """After each `backward`; the last one of a step reduces the gradients, clips them and moves the weights."""
        if self.config.zero_stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(gradients)
        self._set_in_groups(lr=lr)
        self.deepspeed.step()

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        norm = self._grad_norm if self.config.zero_stage == 0 else self.deepspeed.get_global_grad_norm()
        return float(norm if norm is not None else float("nan"))

    def master_partitions(self) -> Sequence[Tensor]:
        """The fp32 master weights that this rank updates: flat slices under ZeRO, whole parameters at stage 0."""
        if self.config.zero_stage == 0:
            return list(self.module.parameters())
        return self.deepspeed.optimizer.single_partition_of_fp32_groups

    def fragments(self) -> Iterator[Fragment]:
        """For every parameter, in the order of `named_parameters`, the part of it that this rank keeps."""
        for position, (name, parameter) in enumerate(self.module.named_parameters()):
            if self.config.zero_stage == 0:
                yield Fragment(name, parameter.shape, 0, parameter.numel(), position, 0)
                continue
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is None:
                yield Fragment(name, parameter.shape, 0, 0, 0, 0)
                continue
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Fragment(name, parameter.shape, there.start, there.numel, mapping.param_group_index, here.start)

    @torch.no_grad()
    def gather(self, partitions: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole fp32 tensors of the parameters' shapes on the CPU of rank 0, {} elsewhere, put together from every
        rank's `partitions`, which have the shapes of `master_partitions()`. All ranks must call it."""
        whole: dict[str, Tensor] = {}
        for fragment in self.fragments():
            local = partitions[fragment.partition].view(-1)[fragment.offset : fragment.offset + fragment.numel]
            buffer = torch.zeros(fragment.shape.numel(), device=self.process.device)
            buffer[fragment.start : fragment.start + fragment.numel] = local
            if self.process.world_size > 1 and self.config.zero_stage > 0:
                dist.reduce(buffer, dst=0)
            if self.process.is_main:
                whole[fragment.name] = buffer.view(fragment.shape).cpu()
        return whole

    @torch.no_grad()
    def scatter(self, whole: dict[str, Tensor], partitions: Sequence[Tensor]) -> None:
        """Fill this rank's `partitions` from whole tensors: the inverse of `gather`."""
        for fragment in self.fragments():
            if fragment.name not in whole or whole[fragment.name].shape != fragment.shape:
                found = tuple(whole[fragment.name].shape) if fragment.name in whole else "nothing"
                raise UserError(
                    f"checkpoint: parameter '{fragment.name}' should be {tuple(fragment.shape)}, the checkpoint has "
                    f"{found}; resume with the model configuration that wrote it"
                )
            slice_here = whole[fragment.name].reshape(-1)[fragment.start : fragment.start + fragment.numel]
            partitions[fragment.partition].view(-1)[fragment.offset : fragment.offset + fragment.numel] = slice_here

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer state under `folder`. All ranks must call it.

        OSError where a file cannot be written, after all ranks are through: DeepSpeed ends in a barrier, which a rank
        that leaves early would never reach.
        """
        failed: list[Exception] = []
        writer = self.deepspeed.checkpoint_engine
        write = writer.save

        def write_or_note(state_dict: Any, path: str) -> None:
            try:
                write(state_dict, path)
            except Exception as error:
                failed.append(error)

        writer.save = write_or_note
        try:
            self.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        finally:
            del writer.save
        if failed:
            # torch.save reports a disk that takes no more as RuntimeError("… unexpected pos …"), without the reason.
            raise failed[0] if isinstance(failed[0], OSError) else OSError(errno.ENOSPC, str(failed[0])) from failed[0]

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote with the same world size and ZeRO stage."""
        path, _ = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise UserError(f"checkpoint: {folder} holds no engine state; choose another checkpoint")
        # DeepSpeed puts back the saved hyper-parameters too; those of the configuration are meant.
        config = self.optimizer
        self._set_in_groups(betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)

    def _set_in_groups(self, **values: Any) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group.update(values)
