"""Models in and out: published weights → a folder that sampling reads, and a checkpoint → published weights."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nitscale.checkpoints import find_weights, write_manifest, write_tensors
from nitscale.config import build
from nitscale.errors import UserError
from nitscale.files import atomic_file, disk_errors, publish_folder
from nitscale.models.presets import PRESETS
from nitscale.models.reference import published_conventions, save_reference
from nitscale.models.transformer import ModelConfig, PackedTransformer
from nitscale.models.weights import import_weights, read_weights, write_weights

CODECS: dict[str, dict[str, Any]] = {
    "nit": {"id": "autoencoder-dc", "source": "dc-ae-f32c32", "channels": 32, "factor": 32},
    "fit": {"id": "autoencoder-kl", "source": "sd-vae-ft-ema", "channels": 4, "factor": 8},
}
"""The autoencoders of the published models."""


def import_checkpoint(file: Path, preset: str, out: Path) -> str:
    """Published weights of a preset → the folder `out`, published whole. One line that says what was imported.

    UserError for a preset or file that is not known, keys or shapes that differ, or an `out` that is not empty.
    """
    if preset not in PRESETS:
        raise UserError(f"checkpoint: preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    model = import_weights(preset, read_weights(file))
    about = {
        "model": asdict(model.config),
        "codec": CODECS[model.config.published_as],
        "classes": [str(number) for number in range(model.config.num_classes)],
    }
    publish_weights(out, model.state_dict(), about, step=0, imported_from=file.name, preset=preset)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"checkpoint: {file} imported as {preset}, {parameters:,} parameters, into {out}"


def consolidate_checkpoint(path: Path, out: Path, which: str | None = None) -> str:
    """Whole weights of a run's checkpoint, an average (the first by default) or "model", → the folder `out`, published
    whole. One line that says what was written. UserError for weights that are not there, or an `out` that is not empty.
    """
    checkpoint = find_weights(path)
    weights = checkpoint.weights(which)
    publish_weights(out, weights, checkpoint.model(), step=checkpoint.step, source=which or "ema")
    return f"checkpoint: step {checkpoint.step} of {path} consolidated, {len(weights)} tensors, into {out}"


def publish_weights(out: Path, weights: Mapping[str, Tensor], about: dict[str, Any], **fields: Any) -> None:
    """A folder with whole weights, model.json (`about`) and a manifest with `fields`, by one rename."""
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with disk_errors(out):
        try:
            staging.mkdir(parents=True)
            write_tensors(staging / "ema.safetensors", weights)
            (staging / "model.json").write_text(json.dumps(about, indent=1))
            write_manifest(staging, **fields)
            publish_folder(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def export_checkpoint(path: Path, file: Path, which: str | None = None) -> str:
    """Weights of a checkpoint, an average (the first by default) or "model", under the published code's names, as one
    file. One line that says so."""
    checkpoint = find_weights(path)
    with torch.device("meta"):
        model = PackedTransformer(build(ModelConfig, checkpoint.model()["model"], "model", {}))
    model.load_state_dict(checkpoint.weights(which), assign=True)
    weights = save_reference(model)
    with atomic_file(file) as temporary:
        renamed = temporary.with_name(temporary.name + file.suffix)  # the format goes by the ending
        try:
            write_weights(renamed, weights)
            os.replace(renamed, temporary)
        finally:
            renamed.unlink(missing_ok=True)
    line = f"checkpoint: step {checkpoint.step} of {path} exported to {file}, {len(weights)} tensors"
    if model.config != published_conventions(model.config):
        line += (
            "\nwarning: this model was trained with other conventions than the published code has (order of RoPE's "
            "coordinates, direction of time): there it gives other samples; see docs/fidelity.md"
        )
    return line
