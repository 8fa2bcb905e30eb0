"""`nitscale demo`: images → shards → packs → a trained NiT → samples → an honest report, on one machine in minutes.

Each stage is the job that a cluster runs, at the size of a laptop, and leaves its result in a folder of its own: run
again, it continues where it stopped. Training runs as one single-threaded rank a core, which on small models beats
one process of many threads. How many steps fit into the time is measured once, in a few throw-away steps, and kept.
"""

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from data_prep.encode import encode_folder
from data_prep.folders import find_images
from data_prep.prepare import EncodeConfig
from nitscale.checkpoints import newest_whole
from nitscale.config import load_config
from nitscale.data.manifest import MANIFEST, Dataset, load_dataset
from nitscale.demo.judge import Judgement, judge
from nitscale.demo.ranks import run_ranks
from nitscale.demo.report import write_report
from nitscale.demo.shapes import draw_folder
from nitscale.errors import UserError
from nitscale.files import atomic_write, exclusive_lock
from nitscale.generate.load import load_trained
from nitscale.train.config import RunConfig
from nitscale.train.environment import machine, versions

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
TRAINED_SIDES = (64, 191)
"""Pixels of the sides of the built-in pictures that are trained on: latents of 2 to 5 cells a side."""
LARGEST_RATIO = 2.0
FACTOR = 32
CHANNELS = 48
PICTURES = 3200
HELD_OUT = 400
FEWEST_HELD_OUT = 20
CALIBRATION_STEPS = 120
CALIBRATION_STARTS = 20
"""Steps of the calibration that are not timed."""
SLACK = 1.12
"""How much slower than measured a step may turn out, on a machine that has other things to do."""
MOST_STEPS = 20_000
MOST_RANKS = 4
STEP_TOKENS = 1024
"""Most tokens of a step, over all ranks."""


@dataclass(frozen=True)
class DemoConfig:
    out: Path
    images: Path | None = None
    """The user's own photos; None draws the built-in set."""
    minutes: float = 9.0
    """Of the whole job."""
    reserve_s: float = 65.0
    """Seconds kept for sampling, judging and the report, on two cores."""


def run_demo(demo: DemoConfig) -> None:
    """Run the stages that are not done yet. UserError names what is wrong and leaves finished stages as they are."""
    began = time.perf_counter()
    if demo.minutes < 1:
        raise UserError(f"demo: --minutes {demo.minutes} is too short; give at least 1, better 9")
    with exclusive_lock(demo.out / ".lock", f"running the demo in {demo.out}"):
        check_same_demo(demo)
        spent = Stopwatch(demo.out / "seconds.json")
        with spent.stage("images"):
            images = prepare_images(demo)
        with spent.stage("encode"):
            encode_all(demo, images)
        with spent.stage("train"):
            config_path = prepare_training(demo, spent.total())
            train(config_path, demo)
        with spent.stage("sample and judge"):
            say("sampling with guidance, then judging against real images never trained on")
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            torch.set_num_threads(1)  # packs are small: a second thread gains little, and loses much on a busy machine
            trained = load_trained(demo.out / "train", device)
            judgement = judge(
                trained, held_out_images(demo), demo.out / "heldout_images" if demo.images is None else None
            )
        finish(demo, judgement, spent, time.perf_counter() - began)


def check_same_demo(demo: DemoConfig) -> None:
    """UserError if the folder was begun with other options: a demo's steps and pictures are chosen once."""
    path = demo.out / "demo.json"
    options = {"images": str(demo.images.resolve()) if demo.images else None, "minutes": demo.minutes}
    if not path.exists():
        atomic_write(path, json.dumps(options).encode())
    elif (before := json.loads(path.read_text())) != options:
        changed = ", ".join(f"--{name} {before[name]}" for name in options if before[name] != options[name])
        raise UserError(f"demo: {demo.out} was begun with {changed}; give another --out, or remove {demo.out}")


def prepare_images(demo: DemoConfig) -> Path:
    """The folder of images to train on; the built-in set also gets one of held-out pictures."""
    if demo.images is not None:
        return split_photos(demo)
    low, high = TRAINED_SIDES
    say(f"drawing {PICTURES + HELD_OUT:,} pictures of eight layouts, {low} to {high} pixels a side")
    draw_folder(demo.out / "images", PICTURES, TRAINED_SIDES, LARGEST_RATIO, "train")
    draw_folder(demo.out / "heldout_images", HELD_OUT, TRAINED_SIDES, LARGEST_RATIO, "held out")
    return demo.out / "images"


def split_photos(demo: DemoConfig) -> Path:
    """Links to the user's photos: every tenth of a class is held out, if there are enough."""
    assert demo.images is not None
    photos = find_images(demo.images)
    say(f"{len(photos.images):,} photos of {len(photos.classes)} classes in {demo.images}")
    place: Counter[int] = Counter()
    for photo in photos.images:
        place[photo.label] += 1
        folder = "heldout_images" if place[photo.label] % 10 == 0 else "images"
        inside = photo.name if photo.name.startswith(f"{photos.classes[photo.label]}/") else f"photos/{photo.name}"
        link = demo.out / folder / inside
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(photo.path.resolve())
    return demo.out / "images"


def encode_all(demo: DemoConfig, images: Path) -> None:
    """Latent shards of the images to train on, and of those held out, with the same codec."""
    say(f"encoding to latent shards: {FACTOR} x {FACTOR} pixels become one token of {CHANNELS} numbers")
    config = EncodeConfig(factor=FACTOR, channels=CHANNELS, max_tokens=64 if demo.images else 4096, shard_samples=1024)
    # Whatever the user's photos are: the rest is enough for a demo.
    report = encode_folder(images, demo.out / "latents", config, max_failures=1.0)
    print(report.summary())
    if (demo.out / "heldout_images").exists():
        codec = load_dataset(demo.out / "latents").codec()
        try:
            heldout = demo.out / "heldout"
            report = encode_folder(demo.out / "heldout_images", heldout, config, codec=codec, max_failures=1.0)
            print(report.summary())
        except UserError as error:
            if demo.images is None:
                raise
            say(f"no photos are held out: {error}")


def held_out_images(demo: DemoConfig) -> Dataset:
    """The real images to judge against. A handful of photos has none to spare, and is judged against itself."""
    if (demo.out / "heldout" / MANIFEST).exists() and load_dataset(
        demo.out / "heldout"
    ).index.num_samples >= FEWEST_HELD_OUT:
        return load_dataset(demo.out / "heldout")
    say(f"fewer than {FEWEST_HELD_OUT} photos are held out: the distance is to the photos trained on")
    return load_dataset(demo.out / "latents")


def prepare_training(demo: DemoConfig, spent_s: float) -> Path:
    """The run's configuration, with as many steps as the time allows; made once and kept."""
    path = demo.out / "train.yaml"
    if path.exists():
        return path
    ranks = number_of_ranks()
    dataset = load_dataset(demo.out / "latents")
    settings: dict[str, Any] = {
        "base": str(RECIPE),
        "run": str(demo.out / "train"),
        "data": {"path": str(demo.out / "latents"), "packs_per_step": ranks, "token_budget": STEP_TOKENS // ranks},
        "model": {"num_classes": len(dataset.manifest.classes)},
        "train": {"steps": CALIBRATION_STEPS, "log_every": CALIBRATION_STARTS, "checkpoint_every": 10**9},
    }
    trial = demo.out / "calibration"
    shutil.rmtree(trial, ignore_errors=True)
    say(f"measuring the speed of a training step with {ranks} {'rank' if ranks == 1 else 'ranks'}")
    atomic_write(demo.out / "calibration.yaml", yaml.safe_dump(settings | {"run": str(trial)}).encode())
    started = time.perf_counter()
    run_ranks(["train", str(demo.out / "calibration.yaml")], ranks, quiet=True)
    metrics = trial / "metrics.jsonl"
    lines = [json.loads(text) for text in metrics.read_text().splitlines()] if metrics.exists() else []
    if len(lines) < CALIBRATION_STEPS // CALIBRATION_STARTS:
        raise UserError("demo: interrupted while measuring, nothing is lost; the same command goes on from here")
    step_s = sum(line["step_s"] for line in lines[1:]) / len(lines[1:])
    shutil.rmtree(trial, ignore_errors=True)
    start_up_s = 15.0
    left_s = demo.minutes * 60 - spent_s - (time.perf_counter() - started) - start_up_s - demo.reserve_s
    steps = int(min(max(left_s / (step_s * SLACK), 100), MOST_STEPS))
    say(f"{step_s:.3f} s a step: {steps:,} steps in {steps * step_s / 60:.1f} minutes")
    settings["train"] = {"steps": steps}
    atomic_write(path, yaml.safe_dump(settings).encode())
    return path


def train(config_path: Path, demo: DemoConfig) -> None:
    """`nitscale train` to the last step. Ctrl-C leaves a checkpoint."""
    config = load_config(RunConfig, config_path)
    if completed_steps(config) >= config.train.steps:
        return
    say(f"training {config.train.steps:,} steps; watch it with: tensorboard --logdir {config.run}")
    # As many ranks as at the beginning, also if the machine has got others.
    run_ranks(["train", str(config_path)], config.data.packs_per_step)
    if completed_steps(config) < config.train.steps:
        raise UserError(
            f"demo: stopped at step {completed_steps(config):,} of {config.train.steps:,}, nothing is lost; "
            "the same command goes on from here"
        )


def completed_steps(config: RunConfig) -> int:
    found = newest_whole(Path(config.run) / "checkpoints")
    return found.step if found else 0


def number_of_ranks() -> int:
    """One on a GPU, else one a core: a divisor of STEP_TOKENS."""
    if torch.cuda.is_available():
        return 1  # the model is too small to be worth more
    return min(len(os.sched_getaffinity(0)), MOST_RANKS)


def finish(demo: DemoConfig, judgement: Judgement, spent: "Stopwatch", this_run_s: float) -> None:
    """report.json, report.html and the contact sheet; the numbers on the terminal."""
    result = judgement.numbers() | {
        "seconds": round(spent.total(), 1),
        "seconds_by_stage": spent.seconds,
        "machine": machine(),
        "versions": versions(),
    }
    atomic_write(demo.out / "report.json", json.dumps(result, indent=1).encode())
    write_report(demo.out, judgement, result)
    print("\n" + judgement.summary())
    print(f"\n{spent.total() / 60:.1f} minutes in all, {this_run_s / 60:.1f} of them now. Look at:")
    print(f"  {demo.out / 'contact_sheet.png'}\n  {demo.out / 'report.html'}")


class Stopwatch:
    """Seconds of each stage, over all runs of the demo."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def stage(self, name: str) -> "Stage":
        return Stage(self, name)

    def total(self) -> float:
        return sum(self.seconds.values())


class Stage:
    """Adds the time of a block to its stage, also if it is interrupted."""

    def __init__(self, watch: Stopwatch, name: str) -> None:
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = self.watch.seconds.get(self.name, 0.0) + time.perf_counter() - self.began
        self.watch.seconds[self.name] = round(seconds, 2)
        atomic_write(self.watch.path, json.dumps(self.watch.seconds).encode())


def say(text: str) -> None:
    print(f"\n▸ {text}", flush=True)
