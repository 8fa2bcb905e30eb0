"""The trainer against a plain PyTorch loop, over ZeRO stages, data and tensor ranks, accumulation and kinds of blocks.

python -m tests.train.matrix --write docs/correctness.md      # all 96 cases, and the resumes: about 15 minutes
python -m tests.train.matrix --pairs                          # every pair of values at least once: about 2 minutes
"""

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NITSCALE_DEVICE"] = "cpu"

import torch

from data_prep.encode import encode_folder
from data_prep.pipeline import EncodeConfig
from nitscale.checkpoints import published
from nitscale.demo.shapes import draw_folder
from nitscale.models.transformer import PackedTransformer
from nitscale.randomness import torch_generator
from nitscale.slices import SliceFiles, shard_of_parameter
from nitscale.train import objective
from nitscale.train.config import RunConfig
from nitscale.train.loop import Trainer, run_training
from nitscale.train.process import Process, leave_process, start_process
from tests.train.forked import fork_ranks, wait_for_groups
from tests.train.plain import PlainRun, train_plainly
from tests.train.tiny import differences, final_state, metrics, tiny_run

STEPS = 8
FAMILIES = {
    "NiT": (),
    "FiTv2": (
        "model.mlp=swiglu",
        "model.mlp_width=48",
        "model.mlp_bias=false",
        "model.adaln=lora+global",
        "model.adaln_rank=8",
        "model.qk_norm=plain",
        "model.qk_norm_eps=1e-6",
    ),
}


@dataclass(frozen=True)
class Case:
    zero_stage: int
    data: int
    tensor: int
    accumulation: int
    family: str
    options: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.data * self.tensor

    def config(self, dataset: Path, run: Path, *more: str) -> RunConfig:
        return tiny_run(
            run,
            dataset,
            f"data.packs_per_step={self.data * self.accumulation}",
            f"engine.zero_stage={self.zero_stage}",
            f"engine.tensor_parallel={self.tensor}",
            f"train.steps={STEPS}",
            *FAMILIES[self.family],
            *self.options,
            *more,
        )


ALL = [Case(*values) for values in itertools.product((0, 1, 2, 3), (1, 2, 4), (1, 2), (1, 2), FAMILIES)]

SPLIT, FULL = "engine.sequence_parallel=true", "engine.recompute=full"
SOME = ("engine.recompute=selective", "engine.recompute_every=2")
VARIANTS = [
    Case(1, 1, 2, 2, "NiT", (SPLIT, "model.norm=rms")),
    Case(2, 2, 2, 1, "FiTv2", (SPLIT, FULL)),
    Case(3, 1, 2, 1, "NiT", (FULL,)),
    Case(1, 2, 1, 1, "FiTv2", SOME),
    Case(2, 2, 2, 1, "NiT", (SPLIT, *SOME)),
    Case(3, 2, 2, 1, "NiT", (SPLIT, FULL, "engine.recompute_every=2")),
    Case(1, 1, 2, 2, "FiTv2", ("model.adaln=lora",)),
    Case(1, 1, 2, 2, "NiT", ("model.adaln=swiglu", "model.norm=weight", "model.qk_norm=rms")),
]
"""Of what is kept for backward, how tokens are spread, and other modulations."""


def pairwise(cases: list[Case]) -> list[Case]:
    """Few cases that together have every pair of values which two of the fields can take; greedily, the same always."""

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations(asdict(case).items(), 2))

    missing = set().union(*(pairs(case) for case in cases))
    chosen: list[Case] = []
    shuffled = random.Random(0).sample(cases, len(cases))
    while missing:
        best = max(shuffled, key=lambda case: (len(pairs(case) & missing), -case.world_size))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def lively(self: PackedTransformer, seed: int, group: Any = None) -> None:
    """Instead of `initialize`, which sets the last linears to 0: then most gradients of the first steps would be 0."""
    with torch.no_grad():
        for name, p in self.named_parameters():
            shard = None if group is None else shard_of_parameter(p, group.rank(), group.size())
            shape = p.shape if shard is None else shard.whole_shape(p.shape)
            whole = torch.randn(shape, generator=torch_generator(seed, "lively", name)) * 0.1
            whole += "_norm.weight" in name
            p.copy_(whole if shard is None else shard.of(whole))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def compare(run: Path, plain: PlainRun) -> dict[str, float]:
    """Largest relative difference of each kind, over steps or tensors."""
    lines = metrics(run)
    checkpoint = published(run / "checkpoints")[-1]
    weights, ema = checkpoint.weights("model"), checkpoint.weights()
    return {
        "loss": max(abs(m["loss"] / theirs - 1) for m, theirs in zip(lines, plain.losses, strict=True)),
        "grad_norm": max(abs(m["grad_norm"] / theirs - 1) for m, theirs in zip(lines, plain.grad_norms, strict=True)),
        "weights": max(relative(weights[name], theirs) for name, theirs in plain.weights.items()),
        "ema": max(relative(ema[name], theirs) for name, theirs in plain.ema.items()),
    }


def compare_gradients(case: Case, dataset: Path, run: Path, process: Process, plain: PlainRun) -> float:
    """Largest relative difference of a parameter's gradient: with β₁ = 0, Adam's first moment is the gradient."""
    run_training(case.config(dataset, run, "optimizer.betas=[0,0.9]", "optimizer.clip=0", "train.steps=1"), process)
    if not process.is_main:
        return 0.0
    slices = SliceFiles(published(run / "checkpoints")[-1].folder / "slices")
    return max(relative(slices.whole("exp_avg", name), theirs) for name, theirs in plain.gradients.items())


def noises(trainer: Trainer) -> list[float]:
    """Of the first step: a number for the noise of each of this rank's packs."""
    seen: list[float] = []
    interpolate = objective.interpolate

    def note(data: Any, noise: torch.Tensor, *arguments: Any) -> Any:
        seen.append(noise.double().sum().item())
        return interpolate(data, noise, *arguments)

    objective.interpolate = note
    try:
        trainer.train()
    finally:
        objective.interpolate = interpolate
    return seen[: trainer.engine.accumulation]


def stopped_at(config: RunConfig, process: Process, *steps: int) -> None:
    """Train to the end, stopped after each of `steps` as if by a signal that one rank got."""
    for step in steps:
        trainer = Trainer(config, process)
        do_step = trainer.train_step

        def step_and_ask(packs: Any, trainer: Any = trainer, do_step: Any = do_step, step: int = step) -> Any:
            line = do_step(packs)
            if process.rank == process.world_size - 1 and trainer.step == step:
                trainer.signals.name = "SIGTERM"
            return line

        trainer.train_step = step_and_ask  # type: ignore[method-assign]
        assert not trainer.train()
    assert run_training(config, process)


def work(
    cases: list[Case], stops: dict[str, tuple[int, ...]], dataset: Path, folder: Path, process: Process
) -> list[dict[str, Any]]:
    """All that is to be shown with this number of ranks: a line for each case. `stops` of runs by name."""

    @cache
    def plain(case: Case) -> PlainRun:
        alone = replace(case, zero_stage=1, data=1, tensor=1, accumulation=case.data * case.accumulation)
        model_only = tuple(option for option in case.options if option.startswith("model."))
        return train_plainly(replace(alone, options=model_only).config(dataset, folder / "plain"))

    lines = []
    for number, case in enumerate(cases):
        began = time.perf_counter()
        run = folder / f"case{number}-{process.world_size}"
        config = case.config(dataset, run / "whole")
        spread = process.spread(case.tensor)
        trainer = Trainer(config, process)
        everyone = process.gather((spread.data_rank, noises(trainer)))
        line: dict[str, Any] = asdict(case)
        if process.is_main:
            by_data_rank: dict[int, set[tuple[float, ...]]] = {}
            for data_rank, noise in everyone:
                by_data_rank.setdefault(data_rank, set()).add(tuple(noise))
            assert all(len(of_peers) == 1 for of_peers in by_data_rank.values()), "tensor peers drew different noise"
            drawn = [value for of_peers in by_data_rank.values() for noise in of_peers for value in noise]
            assert len(set(drawn)) == case.data * case.accumulation, "two packs drew the same noise"
            line |= compare(run / "whole", plain(case))
        theirs = plain(case) if process.is_main else None
        line["gradients"] = compare_gradients(case, dataset, run / "gradients", process, theirs)  # type: ignore[arg-type]
        for name, steps in stops.items():
            stopped_at(case.config(dataset, run / name), process, *steps)
        if process.is_main:
            whole = final_state(run / "whole")
            differing = [name for stopped in stops for name in differences(whole, final_state(run / stopped))]
            line["resumed"] = "exact" if not differing else ", ".join(differing)[:200]
            line["seconds"] = round(time.perf_counter() - began, 1)
            print(json.dumps(line), flush=True)
        lines.append(line)
    return lines


@dataclass(frozen=True)
class Change:
    """A run that goes on from step 4 on other ranks."""

    zero_stage: int
    before: tuple[int, int]
    """Data and tensor ranks."""
    after: tuple[int, int]
    to_stage: int | None = None


CHANGES = [
    Change(stage, before, after)
    for stage in (1, 2, 3)
    for before, after in [
        ((2, 1), (4, 1)), ((4, 1), (2, 1)), ((2, 1), (1, 1)), ((2, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 2), (1, 2)),
        ((1, 2), (2, 2)), ((2, 2), (4, 1)),
    ]
] + [Change(3, (2, 1), (1, 1), to_stage=1), Change(1, (2, 1), (2, 2), to_stage=3)]  # fmt: skip


def change_case(change: Change, after: bool) -> tuple[Case, str]:
    """The case of one half, four packs a step in all, and where it runs."""
    data, tensor = change.after if after else change.before
    stage = change.to_stage if after and change.to_stage is not None else change.zero_stage
    return Case(stage, data, tensor, 4 // data, "NiT"), f"change-{CHANGES.index(change)}"


def work_on_changes(
    changes: list[Change], dataset: Path, folder: Path, process: Process, after: bool
) -> list[dict[str, Any]]:
    """First half, or second half and comparison, of those changes that are on this number of ranks."""
    lines = []
    plain: PlainRun | None = None
    for change in changes:
        case, name = change_case(change, after)
        if case.world_size != process.world_size:
            continue
        config = case.config(dataset, folder / name)
        if not after:
            trainer = Trainer(config, process)
            trainer.config = replace(config, train=replace(config.train, steps=4))
            trainer.train()
            continue
        run_training(config, process)
        if process.is_main:
            plain = plain or train_plainly(config)
            lines.append(asdict(change) | compare(folder / name, plain))
            print(json.dumps(lines[-1]), flush=True)
    return lines


def launch(
    phase: str,
    world_size: int,
    cases: list[Case],
    changes: list[Change],
    stops: dict[str, tuple[int, ...]],
    dataset: Path,
    folder: Path,
) -> list[dict[str, Any]]:
    """Start `world_size` ranks, and give what they found."""
    result, log = folder / f"{phase}-{world_size}.json", folder / f"{phase}-{world_size}.log"

    def rank_main(rank: int) -> None:
        PackedTransformer.initialize = lively  # type: ignore[method-assign]
        process = start_process()
        if phase == "cases":
            lines = work(cases, stops, dataset, folder, process)
        else:
            lines = work_on_changes(changes, dataset, folder, process, phase == "after")
        if process.is_main:
            result.write_text(json.dumps(lines))
        leave_process()

    group = fork_ranks(phase, world_size, rank_main, log)
    wait_for_groups([group])
    assert group.codes == [0] * world_size, log.read_text()[-9000:]
    lines: list[dict[str, Any]] = json.loads(result.read_text())
    return lines


def run_matrix(
    cases: list[Case], changes: list[Change], stops: dict[str, tuple[int, ...]], dataset: Path, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All cases and changes, one start of processes for each number of ranks and phase."""
    lines: list[dict[str, Any]] = []
    for world_size in sorted({case.world_size for case in cases}):
        chosen = [case for case in cases if case.world_size == world_size]
        lines += launch("cases", world_size, chosen, [], stops, dataset, folder)
    changed: list[dict[str, Any]] = []
    for phase, after in (("before", False), ("after", True)):
        for world_size in sorted({change_case(change, after)[0].world_size for change in changes}):
            changed += launch(phase, world_size, [], changes, stops, dataset, folder)
    return lines, changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", action="store_true", help="few cases, and the changes of one stage")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    changes = [
        change for change in CHANGES if change.to_stage is not None or change.zero_stage == 2 or not options.pairs
    ]
    stops = {"twice": (3, 5)} if options.pairs else {"once": (4,), "twice": (3, 5)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_folder(folder / "images", 64, (32, 79), 2.0, "tests")
        encode_folder(folder / "images", folder / "latents", EncodeConfig(shard_samples=16), progress=False)
        cases = (pairwise(ALL) if options.pairs else ALL) + VARIANTS
        lines, changed = run_matrix(cases, changes, stops, folder / "latents", folder)
    text = describe(lines, changed)
    print(text)
    if options.write:
        options.write.write_text(text)
    if options.json:
        options.json.write_text(json.dumps([lines, changed]))


def describe_blocks(line: dict[str, Any]) -> str:
    options = (option.partition(".")[2].replace("=true", "") for option in line["options"])
    return ", ".join((line["family"], *options))


def describe(lines: list[dict[str, Any]], changed: list[dict[str, Any]]) -> str:
    """docs/correctness.md."""
    kinds = ("loss", "grad_norm", "weights", "ema")
    out = [
        "# The trainer against a plain PyTorch loop",
        "",
        "Made by `python -m tests.train.matrix --write docs/correctness.md` on CPU (gloo, fp32, torch "
        f"{torch.__version__}). A tiny model of two blocks with all weights random, {STEPS} steps of a few hundred "
        "tokens. "
        "Each number is the largest relative difference over the steps (loss, gradient norm) or over the parameters "
        "(‖ours − theirs‖ / ‖theirs‖: gradients of the first step, weights and averaged weights after the last) to a "
        "loop without engine (`tests/train/plain.py`). `resumed`: stopped once and twice, against undisturbed: "
        "weights, moments, averages, counters and cursors bit for bit.",
        "",
        "| blocks | ZeRO | data | tensor | packs a rank | loss | gradient norm | gradients | weights | EMA | resumed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = ("zero_stage", "tensor", "data", "accumulation")
    for line in sorted(
        lines, key=lambda line: [len(line["options"]), line["family"] != "NiT", *(line[name] for name in order)]
    ):
        numbers = " | ".join(f"{line[kind]:.0e}" for kind in ("loss", "grad_norm", "gradients", "weights", "ema"))
        out.append(
            f"| {describe_blocks(line)} | {line['zero_stage']} | {line['data']} | {line['tensor']} "
            f"| {line['accumulation']} "
            f"| {numbers} | {line['resumed']} |"
        )
    out += [
        "",
        "## On other ranks",
        "",
        "Four steps on some ranks, the checkpoint read by others, four steps there; against the plain loop as above.",
        "",
        "| ZeRO | data x tensor ranks | | loss | gradient norm | weights | EMA |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in sorted(changed, key=lambda line: (line["zero_stage"], line["before"], line["after"])):
        numbers = " | ".join(f"{line[kind]:.0e}" for kind in kinds)
        stage = f"{line['zero_stage']}" + (f" → {line['to_stage']}" if line["to_stage"] is not None else "")
        before, after = ("x".join(map(str, line[half])) for half in ("before", "after"))
        out.append(f"| {stage} | {before} | → {after} | {numbers} |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
