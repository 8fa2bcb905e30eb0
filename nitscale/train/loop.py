"""The training loop: packs in, weights out.

A step is `packs_per_step` packs over all ranks. Its data, noise, timesteps and label drops are pure functions of
(dataset, seed, step), so that a run that is stopped and resumed repeats exactly what an undisturbed one does. Whatever
ends or turns the run (a signal, skipped steps, a checkpoint that cannot be written, a spike) is decided by all ranks.
"""

import json
import time
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nitscale.checkpoints import Checkpoint
from nitscale.config import to_yaml
from nitscale.data.digest import chain_digest
from nitscale.data.loader import PackLoader
from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Pack, Plan, PlanState
from nitscale.errors import UserError
from nitscale.files import atomic_write, exclusive_lock
from nitscale.layout import PackedBatch
from nitscale.train.checkpoint import Checkpointer
from nitscale.train.config import RunConfig, check_model_fits_data
from nitscale.train.ema import EMA
from nitscale.train.engine import build_engine
from nitscale.train.environment import write_environment
from nitscale.train.faults import NotFinite, StopSignals, Watchdog
from nitscale.train.metrics import MetricsWriter, StepClock, StepStatistics, memory_gib
from nitscale.train.noise_scale import NoiseScale
from nitscale.train.objective import pack_loss
from nitscale.train.preview import Previewer
from nitscale.train.process import Process
from nitscale.train.profiling import Profiler, out_of_memory_report
from nitscale.train.quarantine import Quarantine
from nitscale.train.repa import prepare_repa
from nitscale.train.schedule import check_schedule, learning_rate
from nitscale.train.skips import SkippedSteps
from nitscale.train.spikes import SpikeDetector, write_nonfinite
from nitscale.train.validation import Validator


class Trainer:
    """One run on one process of it. `train()` goes on from the newest checkpoint of the run folder, if there is one."""

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        signals: StopSignals | None = None,
        watchdog: Watchdog | None = None,
        profile: range | None = None,
    ) -> None:
        """`signals` that ask to stop; `watchdog` that is told what the run does; steps to `profile`."""
        self.process = process = process.spread(config.engine.tensor_parallel)
        self.run = Path(config.run)
        self.signals = signals or StopSignals()
        self.watchdog = watchdog or Watchdog(config.faults, process, self.run)
        self.dataset = config.data.open()
        check_model_fits_data(config, self.dataset.manifest)
        self.nominal_step_tokens = config.data.packs_per_step * config.data.token_budget
        check_schedule(config.schedule, config.train.steps, self.nominal_step_tokens)
        self.plan = Plan(self.dataset, config.data.plan(config.seed, config.model.patch_size))
        self.plan.assign(self.plan.step(self.plan.start())[0], process.data_size)  # refuses a wrong number of ranks
        with process.together("load the encoder of repa"):
            self.repa = prepare_repa(
                config.repa, config.model, self.dataset, process.device, config.engine.precision
            )  # fmt: skip
        self.config = config = replace(config, model=self.repa.model)

        accumulation = config.data.packs_per_step // process.data_size
        self.engine = build_engine(config.model, config.seed, config.optimizer, config.engine, process, accumulation)
        self.ema = EMA(self.engine, config.ema)
        self.noise_scale = NoiseScale(self.engine.module.parameters(), process, gradient_scale=process.data_size)
        self.checkpointer = Checkpointer(
            self.run / "checkpoints", process, config.train.keep_last, config.train.keep_every
        )
        self.validator = self.make_validator()
        self.previewer = None
        if config.preview.every:
            self.previewer = Previewer(config.preview, self.dataset.manifest, config.model, process, self.run)
        self.profiler = Profiler(self.run, process, profile)
        self.quarantine = Quarantine(self.run / "quarantine.jsonl", self.dataset.index)
        self.spikes = SpikeDetector(config.faults.spikes)
        self.statistics = StepStatistics(process)
        self.clock = StepClock(config, self.plan, process)
        self.skips = SkippedSteps(process.device)
        self.recent: deque[list[Pack]] = deque(maxlen=config.faults.nonfinite_limit + 1)

        self.plan_state: PlanState = self.plan.start()
        self.step = 0
        self.tokens = 0
        self.images = 0
        self.digest = ""
        self.first_step = 0
        self.saved_step = -1

    def make_validator(self) -> Validator | None:
        config = self.config
        if config.validation.path is None:
            return None
        return Validator(
            config.validation,
            load_dataset(config.validation.path),
            self.dataset.manifest,
            config.model,
            self.process,
            seed=config.seed,
            token_budget=config.data.token_budget,
            weighting=config.flow.weighting,
        )

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
        packs = iter(self.make_loader())
        metrics = MetricsWriter(self.run, self.process, self.step, self.config.train.steps)
        self.clock.restart()
        try:
            while self.step < self.config.train.steps and not self.must_stop():
                self.profiler.step(self.step)
                line = self.train_step(packs)
                metrics.advance()
                if line is not None:
                    with self.process.together("log"):
                        metrics.write(line)
                    self.rewind_after_spike(line)
                self.observe(metrics)
                if self.step % self.config.train.checkpoint_every == 0 and not self.skips.now():
                    self.save()
            self.refuse_skipping()
            if self.step and self.saved_step != self.step:
                self.save()
            self.phase("checkpoint", self.config.faults.save_limit_s)
            self.checkpointer.wait()
        except BaseException as error:
            self.watchdog.broadcast(error)  # before what follows, which may wait for other ranks
            raise
        finally:
            packs.close()
            self.profiler.close()
            metrics.close()
        return self.step >= self.config.train.steps

    def make_loader(self) -> PackLoader:
        return PackLoader(
            self.dataset,
            self.plan,
            self.plan_state,
            rank=self.process.data_rank,
            world_size=self.process.data_size,
            workers=self.config.data.workers,
            pin_memory=self.process.device.type == "cuda",
            members=self.repa.members,
        )

    def train_step(self, packs: Generator[PackedBatch]) -> dict[str, Any] | None:
        """One optimizer step; the log line if this step has one."""
        config = self.config
        planned, self.plan_state = self.plan.step(self.plan_state)
        self.recent.append(planned)
        step_tokens = sum(pack.num_tokens for pack in planned)
        step_images = sum(len(pack.sample_ids) for pack in planned)
        logged = (self.step + 1) % config.train.log_every == 0 or self.step + 1 == config.train.steps
        lr = learning_rate(
            config.schedule,
            config.optimizer.lr,
            step=self.step,
            steps=config.train.steps,
            tokens=self.tokens,
            step_tokens=step_tokens,
            nominal_step_tokens=self.nominal_step_tokens,
        )
        compiles = config.engine.compile and self.step == self.first_step
        with (
            out_of_memory_report(self.run, self.process, planned, config.engine),
            self.signals.kept_from_children() if compiles else nullcontext(),
        ):
            for _ in range(self.engine.accumulation):
                self.micro_step(packs, lr, step_tokens, step_images, measured=logged)
        self.statistics.end_step(self.engine.finite)
        self.skips.add(self.engine.finite)
        self.ema.update(self.step)
        self.step += 1
        self.tokens += step_tokens
        self.images += step_images
        self.digest = chain_digest(self.digest, planned)
        self.clock.add(planned)
        return self.log_line(lr, step_tokens) if logged else None

    def micro_step(
        self, packs: Generator[PackedBatch], lr: float, step_tokens: int, step_images: int, measured: bool
    ) -> None:
        """Forward and backward of one pack; the last one of a step moves the weights."""
        self.phase("data")
        batch = next(packs)
        assert batch.step == self.step, f"loader is at step {batch.step}, trainer at {self.step}"
        self.phase("forward")
        began = time.perf_counter()
        self.quarantine.note(batch)
        self.statistics.unreadable += len(batch.unreadable)
        by_image = self.config.flow.weighting == "image"
        total = step_images if by_image else step_tokens
        on_device = batch.to(self.process.device, non_blocking=True)
        loss = pack_loss(on_device, total, self.config, self.engine, self.repa, self.statistics)
        # The forward alone: the backward ends in a reduction, where all wait for the slowest.
        self.statistics.compute_s += time.perf_counter() - began
        self.statistics.wait_s += batch.data_wait_s
        self.phase("backward")
        share = (batch.layout.num_segments if by_image else batch.layout.num_tokens) / total
        with self.noise_scale.watch(share) if measured else nullcontext():
            self.engine.backward(loss)
        self.phase("update")
        self.engine.step(lr)

    def phase(self, name: str, limit_s: float | None = None) -> None:
        """Tell the watchdog what comes; the first step may compile."""
        if limit_s is None and self.step == self.first_step:
            limit_s = self.config.faults.startup_limit_s
        self.watchdog.phase(name, limit_s, self.step)

    def log_line(self, lr: float, step_tokens: int) -> dict[str, Any]:
        """The metrics since the last line. All ranks must call it. UserError, on all, if the run must not go on."""
        line: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "images": self.images}
        line |= self.statistics.reduce()
        norm = self.engine.grad_norm
        noise_scale = self.noise_scale.read(norm, self.config.data.packs_per_step, step_tokens)
        line |= {"grad_norm": float(norm), "clip_limit": float(self.engine.clip_limit), "noise_scale": noise_scale}
        line |= {"lr": lr} | self.clock.describe() | {"memory_gib": memory_gib(self.process.device)}
        line |= {"checkpoint_stall_s": self.checkpointer.stall_s, "checkpoint_write_s": self.checkpointer.write_s}
        line["data_digest"] = self.digest
        self.quarantine.refuse(line["unreadable"], self.clock.images, self.config.data.path)
        self.clock.restart()
        return line

    def observe(self, metrics: MetricsWriter) -> None:
        """Validation and preview, where this step has one. All ranks must call it."""
        config, began = self.config, time.perf_counter()
        last = self.step == config.train.steps
        if self.validator is not None and (last or self.step % config.validation.every == 0):
            self.phase("validation", config.faults.validation_limit_s)
            line = {"step": self.step, "tokens": self.tokens} | self.validator.run(self.engine.forward)
            with self.process.together("log"):
                metrics.write(line | {"seconds": time.perf_counter() - began}, "validation")
        if self.previewer is not None and (last or self.step % config.preview.every == 0):
            self.phase("preview", config.faults.validation_limit_s)
            sheet = self.previewer.draw(self.step, self.engine.forward)
            if sheet is not None:
                metrics.add_image("preview", sheet, self.step)
        seconds = time.perf_counter() - began  # are not training's
        self.clock.began += seconds
        self.statistics.began += seconds

    def must_stop(self) -> bool:
        """Whether some rank has a reason to end the run after the step just done. All ranks must call it."""
        limit = self.config.faults.nonfinite_limit
        self.phase("agree")
        return self.process.any_rank(
            self.signals.requested or self.checkpointer.failed or self.skips.before_last() >= limit
        )

    def refuse_skipping(self) -> None:
        """NotFinite, on all ranks, if too many steps in a row had gradients that are not finite."""
        skipped = self.skips.now()
        if skipped < self.config.faults.nonfinite_limit:
            return
        path = self.run / "nonfinite.json"
        with self.process.together(f"write {path}"):
            if self.process.is_main:
                packs = [pack for planned in list(self.recent)[-skipped:] for pack in planned]
                write_nonfinite(path, packs, self.dataset.index)
        raise NotFinite(
            f"train: the gradients of the last {skipped} steps to step {self.step} were not finite; what they trained "
            f"on is in {path}. Lower optimizer.lr or set model.qk_norm, then run again: it goes on from the last "
            f"checkpoint in {self.checkpointer.folder}"
        )

    def rewind_after_spike(self, line: dict[str, Any]) -> None:
        """If the loss has risen for good, go back to the weights of a checkpoint before, and on with the data that come
        next. All ranks must call it."""
        if not self.config.faults.spikes.threshold:
            return
        # Rank 0 decides: the loss of other tensor ranks may differ in its last bit.
        began = self.process.decide(lambda: self.spikes.observe(self.step, line["loss"]))
        if began is None:
            return
        self.phase("rewind", self.config.faults.startup_limit_s)
        self.checkpointer.wait()
        checkpoint = self.checkpointer.latest(before=began)
        words = "there is no checkpoint from before, so it goes on"
        if checkpoint is not None:
            self.load(checkpoint)
            words = f"it goes on with the weights of {checkpoint.folder.name}, and with the data that come next"
        if self.process.is_main:
            print(f"train: the loss has risen since step {began}; {words}", flush=True)

    def save(self) -> None:
        """Begin to publish a checkpoint of the current step. All ranks must call it."""
        self.phase("checkpoint", self.config.faults.save_limit_s)
        self.saved_step = self.step
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "images": self.images,
            "data_digest": self.digest,
            "plan": self.plan.state_dict(self.plan_state),
            "clip": self.engine.clip_state.tolist(),
            "noise_scale": self.noise_scale.state(),
            "spikes": self.spikes.state_dict(),
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
            "quarantine.jsonl": self.quarantine.before(self.step) if self.process.is_main else "",
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
        self.load(checkpoint)
        self.step = self.first_step = self.saved_step = state["step"]
        self.tokens, self.images, self.digest = state["tokens"], state["images"], state["data_digest"]
        self.noise_scale.load(state["noise_scale"])
        self.spikes.load_state_dict(state["spikes"])
        with self.process.together(f"write {self.quarantine.path}"):
            if self.process.is_main:  # the steps behind the checkpoint come again
                self.quarantine.set_back((checkpoint.folder / "quarantine.jsonl").read_bytes())
        if self.process.is_main:
            print(
                f"train: resumed from {checkpoint.folder} at step {self.step} of {self.config.train.steps}", flush=True
            )

    def load(self, checkpoint: Checkpoint) -> None:
        """Weights, averages and optimizer state. All ranks must call it."""
        self.checkpointer.load(checkpoint, self.engine, self.ema)
        self.engine.clip_state = torch.tensor(checkpoint.state()["clip"], device=self.process.device)

    def check_same_model(self, checkpoint: Checkpoint) -> None:
        """UserError that names the fields in which the configured model differs from the checkpoint's."""
        before, now = checkpoint.model()["model"], json.loads(json.dumps(asdict(self.config.model)))
        differing = [f"model.{k} is {now.get(k)!r}, was {before.get(k)!r}" for k in now if now.get(k) != before.get(k)]
        if differing:
            raise UserError(
                f"train: cannot resume {checkpoint.folder} with another model: {'; '.join(differing)}; set it back, or "
                "give another run folder"
            )


def run_training(
    config: RunConfig,
    process: Process,
    signals: StopSignals | None = None,
    watchdog: Watchdog | None = None,
    profile: range | None = None,
) -> bool:
    """Train `config` in its run folder, which one training at a time may use. True if the run is complete."""
    run = Path(config.run)
    with ExitStack() as stack:
        with process.together(f"lock {run}"):
            if process.is_main:
                stack.enter_context(exclusive_lock(run / ".lock", f"training in {run}"))
        signals = signals or stack.enter_context(StopSignals())
        return Trainer(config, process, signals, watchdog, profile).train()
