"""What a step did: one JSON line, TensorBoard scalars and a progress bar.

Sums are kept on the device and read once every `log_every` steps; ranks are added up then.
"""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL.Image import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nitscale.data.plan import Pack, Plan
from nitscale.files import atomic_write, disk_errors
from nitscale.layout import PackLayout
from nitscale.models.flops import training_flops
from nitscale.train.config import RunConfig
from nitscale.train.process import Process

QUARTILES = 4
FILES = {"train": "metrics.jsonl", "validation": "validation.jsonl"}
"""Where the lines of each kind are written, in the run folder."""
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}
"""Dense bf16 peak of known GPUs, from NVIDIA's data sheets."""


class StepStatistics:
    """Running sums since the last log line, on the device."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.sums = torch.zeros(2 + 2 * QUARTILES, dtype=torch.float64, device=process.device)
        self.step_sums = torch.zeros_like(self.sums)
        self.extra: dict[str, Tensor] = {}
        self.step_extra: dict[str, Tensor] = {}
        self.steps = torch.zeros((), dtype=torch.float64, device=process.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=process.device)
        self.began = time.perf_counter()
        self.compute_s = 0.0
        """Seconds of this rank's forward passes."""
        self.wait_s = 0.0
        """Seconds that this rank waited for data."""
        self.unreadable = 0
        """Images of this rank that could not be read."""

    @torch.no_grad()
    def add(
        self, squared_error: Tensor, weights: Tensor, t: Tensor, layout: PackLayout, shares: dict[str, Tensor]
    ) -> None:
        """`squared_error` (N,) of each token; `weights` and `t` (n,) of each image; `shares` of other losses, 0-dim,
        which over the packs of a step add up to its mean."""
        for name, share in shares.items():
            self.step_extra[name] = self.step_extra.get(name, 0) + share.double()
        per_image = torch.zeros(len(t), dtype=torch.float64, device=t.device)
        per_image.index_add_(0, layout.segment_ids, squared_error.detach().double())
        tokens = layout.grids.prod(1) * weights
        per_image = per_image * weights
        quartile = (t * QUARTILES).long().clamp(0, QUARTILES - 1)
        self.step_sums[0] += per_image.sum()
        self.step_sums[1] += tokens.sum()
        self.step_sums[2 : 2 + QUARTILES].index_add_(0, quartile, per_image)
        self.step_sums[2 + QUARTILES :].index_add_(0, quartile, tokens.double())

    @torch.no_grad()
    def end_step(self, finite: Tensor) -> None:
        """Take in the packs of a step, unless it left the weights as they were (`finite`, 0-dim bool)."""
        self.sums += torch.where(finite, self.step_sums, 0.0)
        for name, share in self.step_extra.items():
            self.extra[name] = self.extra.get(name, 0) + torch.where(finite, share, 0.0)
        self.steps += finite
        self.skipped += ~finite
        self.step_sums.zero_()
        self.step_extra.clear()

    def reduce(self) -> dict[str, Any]:
        """The sums of all ranks as means, and a fresh start. All ranks must call it."""
        wall_s = time.perf_counter() - self.began
        own = [self.compute_s, self.wait_s / wall_s, float(self.unreadable)]
        times = torch.tensor(own, dtype=torch.float64, device=self.process.device)
        slowest = times.clone()
        names = sorted(self.extra)
        extra = torch.stack([self.extra[name] for name in names]) if names else self.sums.new_zeros(0)
        if self.process.world_size > 1:
            dist.all_reduce(self.sums, group=self.process.data_group)
            dist.all_reduce(extra, group=self.process.data_group)
            dist.all_reduce(times)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        loss, tokens, *rest = self.sums.tolist()
        mean_compute, data_wait, _ = (times / self.process.world_size).tolist()
        line: dict[str, Any] = {"loss": loss / tokens if tokens else None}
        for i in range(QUARTILES):
            count = rest[QUARTILES + i]
            line[f"loss_t{i}"] = rest[i] / count if count else None
        steps = self.steps.item()
        for name, total in zip(names, extra.tolist(), strict=True):
            line[f"{name}_loss"] = total / steps if steps else None
        line["imbalance_observed"] = slowest[0].item() / mean_compute if mean_compute else 1.0
        line["data_wait"] = data_wait
        line["unreadable"] = round(times[2].item()) // self.process.tensor_size
        line["skipped"] = int(self.skipped)
        self.sums.zero_()
        self.steps.zero_()
        self.skipped.zero_()
        self.extra.clear()
        self.began, self.compute_s, self.wait_s, self.unreadable = time.perf_counter(), 0.0, 0.0, 0
        return line


class StepClock:
    """Speed, fill and balance of the steps since the last log line."""

    def __init__(self, config: RunConfig, plan: Plan, process: Process) -> None:
        self.config, self.plan, self.process = config, plan, process
        self.restart()

    def restart(self) -> None:
        self.began = time.perf_counter()
        self.tokens = self.capacity = self.images = self.steps = 0
        self.flops = self.imbalance = 0.0

    def add(self, planned: list[Pack]) -> None:
        """Take in the packs of a step, over all ranks."""
        self.steps += 1
        self.tokens += sum(pack.num_tokens for pack in planned)
        self.images += sum(len(pack.sample_ids) for pack in planned)
        self.capacity += self.config.data.token_budget * len(planned)
        self.flops += sum(training_flops(self.config.model, pack.grids.prod(axis=1)) for pack in planned)
        costs = [sum(pack.cost for pack in share) for share in self.plan.assign(planned, self.process.data_size)]
        self.imbalance += max(costs) / (sum(costs) / len(costs))

    def describe(self) -> dict[str, Any]:
        """What was measured, for the log line."""
        seconds = time.perf_counter() - self.began
        peak = peak_flops(self.process.device)
        flops_per_s = self.flops / seconds / self.process.world_size
        return {
            "tokens_per_s": self.tokens / seconds,
            "step_s": seconds / self.steps,
            "tflops_per_device": flops_per_s / 1e12,
            "mfu": flops_per_s / peak if peak else None,
            "fill": self.tokens / self.capacity,
            "imbalance_predicted": self.imbalance / self.steps,
        }


class MetricsWriter:
    """Rank 0's outputs: a file of JSON lines for each kind in FILES, TensorBoard, and the bar. Nothing on other
    ranks."""

    def __init__(self, run: Path, process: Process, start_step: int, steps: int) -> None:
        self.active = process.is_main
        if not self.active:
            return
        self.run = run
        self.files = {kind: run / name for kind, name in FILES.items()}
        for path in self.files.values():
            truncate_after(path, start_step)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1, flush_secs=30)
        seconds = 1.0 if sys.stderr.isatty() else 30.0  # between two lines of a log file
        self.bar = tqdm(total=steps, initial=start_step, desc="train", unit="step", mininterval=seconds, smoothing=0.1)

    def advance(self) -> None:
        if self.active:
            self.bar.update()

    def write(self, line: dict[str, Any], kind: str = "train") -> None:
        """One line of a kind in FILES, and its numbers in TensorBoard; `line` has the step. UserError if the disk
        refuses it."""
        if not self.active:
            return
        line = {name: value if is_finite(value) else None for name, value in line.items()}
        with disk_errors(self.files[kind]):
            with self.files[kind].open("a") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(f"{kind}/{name}", value, line["step"])
        if kind == "train":
            loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
            self.bar.set_postfix_str(f"loss {loss}, {line['tokens_per_s']:,.0f} tokens/s", refresh=False)

    def add_image(self, name: str, picture: Image, step: int) -> None:
        """A picture of `step` in TensorBoard."""
        if self.active:
            with disk_errors(self.run / "tensorboard"):
                self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.board.close()


def is_finite(value: Any) -> bool:
    """False for a number that JSON does not have: inf or NaN."""
    return not isinstance(value, float) or math.isfinite(value)


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run is about to do again, and a half-written last one."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["step"] <= step:
            kept.append(text)
    atomic_write(path, "".join(f"{text}\n" for text in kept).encode())


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU's allocator, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
