"""The processes of a run: where this one stands among them, and how they decide together.

Ranks are dealt to a grid of data x tensor ranks; the tensor ranks of a data rank are neighbours, so that they share a
node. What one rank decides alone would leave the others waiting for ever: every decision here is made by all.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from nitscale.errors import UserError
from nitscale.train.faults import FailedElsewhere, record_collectives

ON_GPU = torch.cuda.is_available() and os.environ.get("NITSCALE_DEVICE") != "cpu"
"""Whether training runs on GPUs: where there are some, unless NITSCALE_DEVICE=cpu."""
TIMEOUT = timedelta(hours=1)
"""Longest wait in a collective. The watchdog of `nitscale.train.faults` ends a run that hangs long before."""
T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """Where this process stands among those of the run."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = None
    """Group for small messages between hosts, which must not wait for the GPU; None is the default group."""
    tensor_size: int = 1
    """Ranks over which each linear is spread."""
    data_group: Any = None
    """The ranks that have the same part of the weights, and other packs; None: all ranks."""
    tensor_group: Any = None
    """The ranks that have the same packs, and other parts of the weights; None: this rank alone."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size

    @property
    def data_size(self) -> int:
        return self.world_size // self.tensor_size

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    def spread(self, tensor_parallel: int) -> "Process":
        """The same process on a grid with so many tensor ranks. All ranks must call it. UserError if their number does
        not divide that of all ranks."""
        if self.world_size % tensor_parallel:
            raise UserError(
                f"engine: tensor_parallel={tensor_parallel} does not divide the {self.world_size} ranks of this run; "
                "start another number of ranks, or set engine.tensor_parallel"
            )
        if tensor_parallel == 1:
            return replace(self, tensor_size=1, data_group=None, tensor_group=None)
        ranks = torch.arange(self.world_size).view(-1, tensor_parallel)
        tensor_group = own_group(ranks.tolist(), self.rank)
        data_group = own_group(ranks.T.tolist(), self.rank)
        return replace(self, tensor_size=tensor_parallel, data_group=data_group, tensor_group=tensor_group)

    def with_own_control(self) -> "Process":
        """The same process with a control group of its own, for a thread. All ranks must call it."""
        return self if self.world_size == 1 else replace(self, control=dist.new_group(backend="gloo", timeout=TIMEOUT))

    @contextmanager
    def together(self, purpose: str) -> Iterator[None]:
        """A block that every rank enters: if it fails on one, it fails on all, and none waits for ever."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = [
            f"rank {rank}: {report}"
            for rank, report in enumerate(self.gather(None if failure is None else str(failure)))
            if report is not None
        ]
        if failure is not None:
            raise failure
        if failed:
            raise FailedElsewhere(f"could not {purpose} ({'; '.join(failed)})")

    def gather(self, value: T) -> list[T]:
        """The small values of all ranks, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

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


def own_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Make all these groups, on all ranks in the same order, and give the one with `rank`."""
    made = [dist.new_group(ranks, timeout=TIMEOUT) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)


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
    if not dist.is_initialized():
        if ON_GPU:
            record_collectives()
        # A group of one needs no port; with `RANK` and the like in the environment, child processes would think that
        # they belong to it.
        one: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        dist.init_process_group("nccl" if ON_GPU else "gloo", timeout=TIMEOUT, **one)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if ON_GPU and dist.get_world_size() > 1 else None
    return Process(dist.get_rank(), dist.get_world_size(), device, control)


def leave_process(code: int = 0) -> NoReturn:
    """End this process with an exit code when all ranks are here: the end of `start_process`.

    Not by the interpreter's own end: with gloo (torch 2.13) one exit in ten aborted there with "terminate called
    without an active exception", which a launcher takes for a failed rank.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
