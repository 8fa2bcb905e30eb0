"""What test_endings.py runs: whole trainings on two ranks by `nitscale train`, in each of which something goes wrong.

python -m tests.train.ending_trainings DATASET FOLDER leaves FOLDER/CASE.log, FOLDER/CASE (the run) and
FOLDER/results.json. Ranks are forked after everything was imported, and the cases run at the same time.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nitscale import cli
from nitscale.config import to_yaml
from nitscale.train import checkpoint, loop
from nitscale.train.loop import Trainer
from tests.train.forked import fork_ranks, wait_for_groups
from tests.train.tiny import tiny_run

Patch = Callable[[int], None]


def ask(asked: int) -> Callable[[int], None]:
    """SIGTERM to this process, if it is rank `asked`."""
    return lambda rank: os.kill(os.getpid(), signal.SIGTERM) if rank == asked else None


def around(owner: Any, name: str, before: Callable[..., None]) -> None:
    """Call `before`, with the same arguments, whenever a function or method is called."""
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments)
        return function(*arguments, **options)

    setattr(owner, name, wrapped)


def in_step(action: Callable[[int], None], first: int, last: int | None = None) -> Patch:
    """Do something in the forward of the steps from `first` to `last`."""

    def patch(rank: int) -> None:
        def before(batch: Any, *_: Any) -> None:
            if first <= batch.step <= (first if last is None else last):
                action(rank)

        around(loop, "pack_loss", before)

    return patch


def in_start_up(rank: int) -> None:
    around(loop, "build_engine", lambda *_: ask(0)(rank))


def in_save(rank: int) -> None:
    around(checkpoint, "write_tensors", lambda *_: ask(1)(rank))


def in_validation(rank: int) -> None:
    around(loop.Validator, "run", lambda *_: ask(0)(rank))


def in_compile(rank: int) -> None:
    def before(trainer: Trainer, *_: Any) -> None:
        if trainer.step == 0:
            threading.Timer(2.0, ask(0), [0]).start()

    around(Trainer, "train_step", before)


def nan(steps: range) -> Patch:
    """Losses of rank 1 that are not finite."""

    def patch(rank: int) -> None:
        pack_loss = loop.pack_loss

        def wrapped(batch: Any, *arguments: Any) -> Any:
            loss = pack_loss(batch, *arguments)
            return loss * float("nan") if rank == 1 and batch.step in steps else loss

        loop.pack_loss = wrapped

    return patch


def sleep_for_ever(rank: int) -> None:
    while rank == 1:
        time.sleep(60)


def fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("the data are mouldy")


CASES: dict[str, tuple[Patch, tuple[str, ...]]] = {
    "sigterm_in_start_up": (in_start_up, ()),
    "sigterm_in_step": (in_step(ask(1), 2), ("engine.zero_stage=2",)),
    "sigterm_in_save": (in_save, ()),
    "sigterm_in_validation": (in_validation, ("validation.every=2", "validation.images=8")),
    "nan_once": (nan(range(3, 4)), ("engine.zero_stage=3",)),
    "nan_for_ever": (nan(range(5, 100)), ("faults.nonfinite_limit=3", "train.steps=30")),
    "sleeps": (in_step(sleep_for_ever, 5), ("faults.step_limit_s=8",)),
    "raises": (in_step(fail, 5), ()),
    "sigterm_in_compile": (in_compile, ("engine.compile=true", "model.depth=1")),
}


def train(patch: Patch, config: Path, rank: int) -> None:
    sys.argv = ["nitscale", "train", str(config)]
    patch(rank)
    cli.main()


def main(dataset: Path, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    groups = []
    for name in names:
        patch, options = CASES[name]
        if name == "sigterm_in_validation":
            options += (f"validation.path={dataset}",)
        config = folder / f"{name}.yaml"
        config.write_text(to_yaml(tiny_run(folder / name, dataset, *options)))
        groups.append(fork_ranks(name, 2, partial(train, patch, config), folder / f"{name}.log"))
    wait_for_groups(groups)
    results = {group.name: [group.codes, group.left, group.seconds] for group in groups}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
