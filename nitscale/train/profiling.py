"""Where time and memory go: a profiler's trace of some steps on request, and a report when memory runs out.

`--profile 10:13` writes `profile/steps-10-13-rank-00000.json.gz`, for chrome://tracing or ui.perfetto.dev, and on GPUs
beside it a memory snapshot for pytorch.org/memory_viz. The first and the last rank do so: they are seldom on one node.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from nitscale.data.plan import Pack
from nitscale.errors import UserError
from nitscale.files import atomic_write
from nitscale.train.engine import EngineConfig
from nitscale.train.process import Process

ALLOCATIONS = 200_000
"""Newest allocations and frees that a memory snapshot knows the origin of."""
OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator: can't allocate memory|CUDA error: out of memory|_ALLOC_FAILED")
"""What a RuntimeError says when it is torch's allocator on a CPU, or a library beside torch on a GPU, that failed."""


def parse_profile(text: str) -> range:
    """ "10:13" → the steps 10, 11 and 12, counted from 0. UserError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"train: --profile {text!r} must be FIRST:END, such as 10:13 for the steps 10, 11 and 12")
    return range(int(match[1]), int(match[2]))


class Profiler:
    """Traces a range of steps. `step` is called before every step, and `close` at the end."""

    def __init__(self, run: Path, process: Process, steps: range | None) -> None:
        chosen = process.rank in (0, process.world_size - 1)
        self.steps = steps if chosen else None
        """None once there is nothing more to do."""
        self.process = process
        self.trace: Any = None
        if self.steps is not None:
            name = f"steps-{self.steps.start}-{self.steps.stop}-rank-{process.rank:05d}"
            self.path = run / "profile" / name

    def step(self, step: int) -> None:
        """Step `step` is about to begin."""
        if self.steps is None:
            return
        if self.trace is not None and step >= self.steps.stop:
            self.close()
        elif self.trace is not None:
            self.trace.step()
        elif self.steps.start - 1 <= step < self.steps.stop:
            self.start(step)

    def start(self, step: int) -> None:
        """Begin with a step of warm-up, where there is one before the first: starting to trace takes time."""
        assert self.steps is not None
        on_gpu = self.process.device.type == "cuda"
        warmup = max(self.steps.start - step, 0)
        self.trace = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
            schedule=schedule(wait=0, warmup=warmup, active=len(self.steps) + 1),
            record_shapes=True,
            profile_memory=True,
        )
        self.trace.start()
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)

    def close(self) -> None:
        """Write what was traced, if anything was. A disk that refuses it does not end the run."""
        if self.steps is None:
            return
        asked, self.steps = self.steps, None
        if self.trace is None:
            self.say(f"nothing is traced: steps {asked.start} to {asked.stop - 1} were not run")
            return
        trace, self.trace = self.trace, None
        trace.stop()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.process.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(f"{self.path}.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
            trace.export_chrome_trace(f"{self.path}.json.gz")
            self.say(f"{self.path}.json.gz is written; open it in ui.perfetto.dev")
        except (OSError, RuntimeError) as error:
            self.say(f"{self.path}.json.gz cannot be written: {error}")

    def say(self, words: str) -> None:
        if self.process.is_main:
            print(f"profile: {words}", flush=True)


@contextmanager
def out_of_memory_report(run: Path, process: Process, packs: Sequence[Pack], config: EngineConfig) -> Iterator[None]:
    """Turn running out of memory in the step of these packs into a UserError with the ways out, after writing what the
    memory held into `oom/` in the run folder."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not OUT_OF_MEMORY.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        report = write_memory_report(run, process, reason)
        largest = max(packs, key=lambda pack: pack.num_tokens)
        raise UserError(
            f"train: rank {process.rank} ran out of memory at step {largest.step} ({reason}). The step's largest pack "
            f"has {largest.num_tokens:,} tokens, its longest image {int(largest.lengths.max()):,}. "
            f"{ways_out(config)}, then run again: it goes on from the last checkpoint. What the memory held: {report}"
        ) from error


def ways_out(config: EngineConfig) -> str:
    """What needs less memory than this configuration, the least costly first."""
    ways = []
    if config.recompute != "full":
        stronger = "selective or full" if config.recompute == "none" else "full"
        ways.append(f"set engine.recompute={stronger} (now {config.recompute})")
    elif config.recompute_every > 1:
        ways.append(f"set engine.recompute_every=1 (now {config.recompute_every})")
    if config.zero_stage < 3:
        ways.append(f"raise engine.zero_stage (now {config.zero_stage}) or engine.tensor_parallel")
    ways.append("in a new run, lower data.token_budget and raise data.packs_per_step by as much")
    return "; or ".join(ways)


def write_memory_report(run: Path, process: Process, reason: str) -> Path:
    """`oom/rank-NNNNN.txt`, and on a GPU a snapshot `.pickle` beside it. Whatever goes wrong with them must not hide
    that memory ran out."""
    path = run / "oom" / f"rank-{process.rank:05d}.txt"
    with suppress(Exception):
        text = [reason, ""]
        if process.device.type == "cuda":
            text.append(torch.cuda.memory_summary(process.device))
        else:
            text.append(Path("/proc/self/status").read_text() + Path("/proc/meminfo").read_text())
        atomic_write(path, "\n".join(text).encode())
        if process.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
    return path
