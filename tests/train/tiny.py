"""A run small enough for tests, and what is compared between two runs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nitscale.checkpoints import published
from nitscale.config import load_config
from nitscale.train.config import RunConfig


def tiny_run(folder: Path, dataset: Path, *overrides: str) -> RunConfig:
    """A NiT of two blocks, four packs of at most 64 tokens a step, 8 steps, a checkpoint every 4."""
    return load_config(
        RunConfig,
        None,
        [
            f"run={folder}",
            f"data.path={dataset}",
            "data.token_budget=64",
            "data.packs_per_step=4",
            "data.workers=0",
            "model.width=32",
            "model.depth=2",
            "model.heads=2",
            "model.num_classes=8",
            "optimizer.lr=1e-3",
            "ema.decays=[0.9]",
            "train.steps=8",
            "train.log_every=1",
            "train.checkpoint_every=4",
            "train.keep_last=10",
            *overrides,
        ],
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves: weights, optimizer moments and averages of all ranks, state.json."""
    checkpoint = published(folder / "checkpoints")[-1].folder
    state: dict[str, Any] = {}
    for file in sorted((checkpoint / "slices").iterdir()):
        state |= {f"{file.name}/{name}": value for name, value in load_file(file).items()}
        with safe_open(file, "pt") as slices:
            state[file.name] = slices.metadata()
    state["state.json"] = json.loads((checkpoint / "state.json").read_text())
    return state


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of the entries that are not bit for bit the same."""
    assert a.keys() == b.keys() and any("exp_avg" in name for name in a)
    return [
        name
        for name in a
        if not (torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name])
    ]
