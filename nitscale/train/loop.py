"""The training loop: packs in, weights out.

A step is `packs_per_step` packs over all ranks. Its data, noise, timesteps and label drops are pure functions of
(dataset, seed, step), so that a run that is stopped and resumed repeats exactly what an undisturbed one does.
"""

import json
import signal
import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from nitscale.checkpoints import Checkpoint
from nitscale.config import to_yaml
from nitscale.data.digest import chain_digest
from nitscale.data.loader import PackLoader
from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Pack, Plan, PlanState
from nitscale.errors import UserError
from nitscale.files import atomic_write, disk_errors, exclusive_lock
from nitscale.flow.losses import reduce_tokens, squared_error
from nitscale.flow.paths import interpolate
from nitscale.flow.timesteps import sample_timesteps
from nitscale.layout import PackedBatch
from nitscale.models.flops import training_flops
from nitscale.randomness import bernoulli, torch_generator
from nitscale.train.checkpoint import Checkpointer
from nitscale.train.config import RunConfig
from nitscale.train.ema import EMA
from nitscale.train.engine import build_engine
from nitscale.train.environment import write_environment
from nitscale.train.metrics import MetricsWriter, StepStatistics, memory_gib, peak_flops
from nitscale.train.preview import Previewer
from nitscale.train.process import Process
from nitscale.train.profiling import Profiler, out_of_memory_report
from nitscale.train.schedule import check_schedule, learning_rate
from nitscale.train.skips import SkippedSteps
from nitscale.train.validation import Validator

MOST_UNREADABLE = 0.01
"""Share of the images since the last log line above which a run stops because of unreadable ones …"""
FEWEST_UNREADABLE = 10
"""… if there are more than this."""

SKIPPED_LIMIT = 10


class Trainer:
    """One run on one process of it. `train()` goes on from the newest checkpoint of the run folder, if there is one."""

    def __init__(self, config: RunConfig, process: Process, profile: range | None = None) -> None:
        self.config = config
        self.process = process = process.spread(config.engine.tensor_parallel)
        self.run = Path(config.run)
        self.ledger = self.run / "quarantine.jsonl"
        self.dataset = config.data.open()
        check_model_fits_data(config, self.dataset.manifest)
        self.plan = Plan(self.dataset, config.data.plan(config.seed, config.model.patch_size))
        self.plan.assign(self.plan.step(self.plan.start())[0], process.data_size)  # refuses a wrong number of ranks
        accumulation = config.data.packs_per_step // process.data_size
        self.engine = build_engine(config.model, config.seed, config.optimizer, config.engine, process, accumulation)
        self.ema = EMA(self.engine, config.ema)
        self.checkpointer = Checkpointer(
            self.run / "checkpoints", process, config.train.keep_last, config.train.keep_every
        )
        self.validator = None
        if config.validation.path is not None:
            self.validator = Validator(
                config.validation,
                load_dataset(config.validation.path),
                self.dataset.manifest,
                config.model,
                process,
                seed=config.seed,
                token_budget=config.data.token_budget,
                weighting=config.flow.weighting,
            )
        self.previewer = None
        if config.preview.every:
            self.previewer = Previewer(config.preview, self.dataset.manifest, config.model, process, self.run)
        self.profiler = Profiler(self.run, process, profile)
        self.statistics = StepStatistics(process)
        self.plan_state: PlanState = self.plan.start()
        self.nominal_step_tokens = config.data.packs_per_step * config.data.token_budget
        check_schedule(config.schedule, config.train.steps, self.nominal_step_tokens)
        self.step = 0
        self.tokens = 0
        self.images = 0
        self.digest = ""
        self.images_at_log = 0
        self.skips = SkippedSteps(process.device)
        self.stop_requested = False
        self.saved_step = -1

    def train(self) -> bool:
        """Train to the last step, or until a signal asks to stop; either way the last step done is in a checkpoint.
        True if the run is complete."""
        self.resume()
        with self.process.together(f"write {self.run}"):
            if self.process.is_main:
                atomic_write(self.run / "config.yaml", to_yaml(self.config).encode())
        write_environment(self.run, self.process)
        if self.step >= self.config.train.steps:
            return True
        loader = PackLoader(
            self.dataset,
            self.plan,
            self.plan_state,
            rank=self.process.data_rank,
            world_size=self.process.data_size,
            workers=self.config.data.workers,
            pin_memory=self.process.device.type == "cuda",
        )
        metrics = MetricsWriter(self.run, self.process, self.step, self.config.train.steps)
        previous = self.catch_signals()
        self.since_log = StepClock()
        packs = iter(loader)
        try:
            while self.step < self.config.train.steps and not self.process.any_rank(self.must_stop()):
                self.profiler.step(self.step)
                line = self.train_step(packs)
                metrics.advance()
                if line is not None:
                    with self.process.together("log"):
                        metrics.write(line)
                self.observe(metrics)
                if self.step % self.config.train.checkpoint_every == 0 and not self.skips.now():
                    self.save()
            self.refuse_skipping()
            if self.step and self.saved_step != self.step:
                self.save()
            self.checkpointer.wait()
        finally:
            packs.close()
            self.profiler.close()
            metrics.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.step >= self.config.train.steps

    def train_step(self, packs: Generator[PackedBatch]) -> dict[str, Any] | None:
        """One optimizer step; the log line if this step has one."""
        config = self.config
        planned, self.plan_state = self.plan.step(self.plan_state)
        step_tokens = sum(pack.num_tokens for pack in planned)
        step_images = sum(len(pack.sample_ids) for pack in planned)
        lr = learning_rate(
            config.schedule,
            config.optimizer.lr,
            step=self.step,
            steps=config.train.steps,
            tokens=self.tokens,
            step_tokens=step_tokens,
            nominal_step_tokens=self.nominal_step_tokens,
        )
        with out_of_memory_report(self.run, self.process, planned, config.engine):
            for _ in range(self.engine.accumulation):
                batch = next(packs)
                began = time.perf_counter()
                self.note_unreadable(batch)
                assert batch.step == self.step, f"loader is at step {batch.step}, trainer at {self.step}"
                total = step_images if config.flow.weighting == "image" else step_tokens
                loss = self.pack_loss(batch.to(self.process.device, non_blocking=True), total)
                # The forward alone: the backward ends in a reduction, where all wait for the slowest.
                self.statistics.compute_s += time.perf_counter() - began
                self.statistics.wait_s += batch.data_wait_s
                self.engine.backward(loss)
                self.engine.step(lr)
        self.statistics.end_step(self.engine.finite)
        self.skips.add(self.engine.finite)
        self.ema.update(self.step)
        self.step += 1
        self.tokens += step_tokens
        self.images += step_images
        self.digest = chain_digest(self.digest, planned)
        self.since_log.add(planned, self)
        if self.step % config.train.log_every and self.step != config.train.steps:
            return None
        return self.log_line(lr)

    def observe(self, metrics: MetricsWriter) -> None:
        """Validation and preview, where this step has one. All ranks must call it."""
        config, began = self.config, time.perf_counter()
        last = self.step == config.train.steps
        if self.validator is not None and (last or self.step % config.validation.every == 0):
            losses = self.validator.run(self.engine.forward)
            line = {"step": self.step, "tokens": self.tokens} | losses
            with self.process.together("log"):
                metrics.write(line | {"seconds": time.perf_counter() - began}, "validation")
        if self.previewer is not None and (last or self.step % config.preview.every == 0):
            sheet = self.previewer.draw(self.step, self.engine.forward)
            if sheet is not None:
                metrics.add_image("preview", sheet, self.step)
        seconds = time.perf_counter() - began  # are not training's
        self.since_log.began += seconds
        self.statistics.began += seconds

    def pack_loss(self, batch: PackedBatch, total: int) -> torch.Tensor:
        """This pack's share of the step's loss: its squared velocity error over the tokens, or images, of the step."""
        config, layout, device = self.config, batch.layout, self.process.device
        key = (batch.step, batch.pack)
        noise_generator = torch_generator(config.seed, "noise", *key, device=device)
        noise = torch.randn(batch.tokens.shape, generator=noise_generator, device=device)
        t = sample_timesteps(
            layout.num_segments,
            torch_generator(config.seed, "timestep", *key),
            config.flow.timesteps,
            mean=config.flow.mean,
            std=config.flow.std,
        )
        t = t.to(device, torch.float32)
        drop = bernoulli(layout.num_segments, config.model.class_dropout, config.seed, "label drop", *key)
        labels = torch.where(torch.from_numpy(drop).to(device), config.model.num_classes, batch.labels)
        noisy, velocity = interpolate(batch.tokens.float(), noise, t, layout)
        error = squared_error(self.engine.forward(noisy, t, labels, layout), velocity)
        self.statistics.add(error, batch.weights, t, layout)
        return reduce_tokens(error, layout, weights=batch.weights, total=total, per=config.flow.weighting)

    def note_unreadable(self, batch: PackedBatch) -> None:
        """One line of quarantine.jsonl for each image of the pack that could not be read; it trains with weight 0."""
        self.statistics.unreadable += len(batch.unreadable)
        if batch.unreadable:
            with disk_errors(self.ledger), self.ledger.open("a") as ledger:
                for sample_id, reason in batch.unreadable:
                    name = self.dataset.index.key(sample_id)
                    ledger.write(
                        json.dumps({"step": batch.step, "sample": sample_id, "key": name, "reason": reason}) + "\n"
                    )

    def quarantined(self) -> str:
        """The ledger's lines of the steps that are behind."""
        lines = self.ledger.read_text().splitlines(keepends=True) if self.ledger.exists() else []
        return "".join(line for line in lines if json.loads(line)["step"] < self.step)

    def log_line(self, lr: float) -> dict[str, Any]:
        """The metrics since the last line. All ranks must call it. UserError, on all, if the run must not go on."""
        config = self.config
        line: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "images": self.images}
        line |= self.statistics.reduce()
        line |= {"grad_norm": float(self.engine.grad_norm), "lr": lr} | self.since_log.describe(self)
        self.since_log = StepClock()
        line |= {"memory_gib": memory_gib(self.process.device), "data_digest": self.digest}
        images = self.images - self.images_at_log
        if line["unreadable"] > max(MOST_UNREADABLE * images, FEWEST_UNREADABLE):
            raise UserError(
                f"train: {line['unreadable']} of the last {images:,} images could not be read, see "
                f"{self.ledger}; mend the data set at {config.data.path}, then run again"
            )
        self.images_at_log = self.images
        return line

    def must_stop(self) -> bool:
        """Whether this rank has a reason to end the run after the step just done."""
        return self.stop_requested or self.checkpointer.failed or self.skips.before_last() >= SKIPPED_LIMIT

    def refuse_skipping(self) -> None:
        """UserError on all ranks if too many steps in a row had gradients that are not finite."""
        skipped = self.skips.now()
        if skipped >= SKIPPED_LIMIT:
            raise UserError(
                f"train: the gradients of the last {skipped} steps to step {self.step} were not finite; lower "
                f"optimizer.lr or set model.qk_norm, then run again: it goes on from the last checkpoint in "
                f"{self.checkpointer.folder}"
            )

    def save(self) -> None:
        """Begin to publish a checkpoint of the current step. All ranks must call it."""
        self.saved_step = self.step
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "images": self.images,
            "data_digest": self.digest,
            "plan": self.plan.state_dict(self.plan_state),
        }
        model = {
            "model": asdict(self.config.model),
            "codec": self.dataset.manifest.codec,
            "classes": self.dataset.manifest.classes,
        }
        texts = {
            "state.json": json.dumps(state, indent=1),
            "model.json": json.dumps(model, indent=1),
            "config.yaml": to_yaml(self.config),
            "quarantine.jsonl": self.quarantined() if self.process.is_main else "",
        }
        self.checkpointer.save(self.step, self.engine, self.ema, texts)

    def resume(self) -> None:
        """Take up the newest checkpoint of the run folder, if there is one."""
        checkpoint = self.checkpointer.latest()
        if checkpoint is None:
            return
        state = checkpoint.state()
        self.check_same_model(checkpoint)
        self.plan_state = self.plan.load_state(state["plan"])
        self.checkpointer.load(checkpoint, self.engine, self.ema)
        self.step = self.saved_step = state["step"]
        self.tokens, self.images, self.digest = state["tokens"], state["images"], state["data_digest"]
        self.images_at_log = self.images
        with self.process.together(f"write {self.ledger}"):
            if self.process.is_main:  # the steps behind the checkpoint come again
                atomic_write(self.ledger, (checkpoint.folder / "quarantine.jsonl").read_bytes())
        if self.process.is_main:
            print(
                f"train: resumed from {checkpoint.folder} at step {self.step} of {self.config.train.steps}", flush=True
            )

    def check_same_model(self, checkpoint: Checkpoint) -> None:
        """UserError that names the fields in which the configured model differs from the checkpoint's."""
        before, now = checkpoint.model()["model"], json.loads(json.dumps(asdict(self.config.model)))
        differing = [f"model.{k} is {now.get(k)!r}, was {before.get(k)!r}" for k in now if now.get(k) != before.get(k)]
        if differing:
            raise UserError(
                f"train: cannot resume {checkpoint.folder} with another model: {'; '.join(differing)}; set it back, or "
                "give another run folder"
            )

    def catch_signals(self) -> dict[int, Any]:
        """Ctrl-C, SIGTERM and SIGUSR1 end the run after the step in progress. A Ctrl-C two seconds or more after the
        first ends it at once; within them, it is a launcher that passes on what the terminal already sent."""
        asked: list[float] = []

        def ask_to_stop(number: int, frame: FrameType | None) -> None:
            if asked and number == signal.SIGINT and time.monotonic() - asked[0] > 2:
                raise KeyboardInterrupt
            asked.append(time.monotonic())
            self.stop_requested = True

        return {n: signal.signal(n, ask_to_stop) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}


class StepClock:
    """Speed, fill and balance of the steps since the last log line."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.tokens = self.capacity = self.steps = 0
        self.flops = self.imbalance = 0.0

    def add(self, planned: list[Pack], trainer: Trainer) -> None:
        config, data_size = trainer.config, trainer.process.data_size
        self.steps += 1
        self.tokens += sum(pack.num_tokens for pack in planned)
        self.capacity += config.data.token_budget * len(planned)
        self.flops += sum(training_flops(config.model, pack.grids.prod(axis=1)) for pack in planned)
        costs = [sum(pack.cost for pack in share) for share in trainer.plan.assign(planned, data_size)]
        self.imbalance += max(costs) / (sum(costs) / len(costs))

    def describe(self, trainer: Trainer) -> dict[str, Any]:
        """What was measured, for the log line."""
        seconds = time.perf_counter() - self.began
        peak = peak_flops(trainer.process.device)
        flops_per_s = self.flops / seconds / trainer.process.world_size
        return {
            "tokens_per_s": self.tokens / seconds,
            "step_s": seconds / self.steps,
            "tflops_per_device": flops_per_s / 1e12,
            "mfu": flops_per_s / peak if peak else None,
            "fill": self.tokens / self.capacity,
            "imbalance_predicted": self.imbalance / self.steps,
        }


def check_model_fits_data(config: RunConfig, manifest: Any) -> None:
    """UserError where the model's channels or classes are not the dataset's."""
    if config.model.in_channels != manifest.channels:
        raise UserError(
            f"train: model.in_channels={config.model.in_channels}, but the latents of {config.data.path} have "
            f"{manifest.channels} channels; set model.in_channels={manifest.channels}"
        )
    if config.model.num_classes < len(manifest.classes):
        raise UserError(
            f"train: model.num_classes={config.model.num_classes}, but {config.data.path} has {len(manifest.classes)} "
            f"classes; set model.num_classes={len(manifest.classes)}"
        )


def run_training(config: RunConfig, process: Process, profile: range | None = None) -> bool:
    """Train `config` in its run folder, which one training at a time may use. True if the run is complete."""
    run = Path(config.run)
    with ExitStack() as stack:
        with process.together(f"lock {run}"):
            if process.is_main:
                stack.enter_context(exclusive_lock(run / ".lock", f"training in {run}"))
        return Trainer(config, process, profile).train()
