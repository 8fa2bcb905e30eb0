"""Files of published weights, and the published model of a preset.

`.safetensors` files, and torch's `.bin`, `.pt`, `.pth`, of which only tensors are read (`weights_only=True`).
"""

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nitscale.errors import UserError
from nitscale.models.presets import preset
from nitscale.models.reference import load_weights, published_conventions, without_wrappers
from nitscale.models.transformer import PackedTransformer

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
NESTS = ("ema", "state_dict", "model", "module")
"""Keys under which a torch file may keep its state dict; the averaged weights are preferred."""


def import_weights(preset_name: str, state_dict: Mapping[str, Tensor]) -> PackedTransformer:
    """The published model of a preset with these published weights; with their REPA projector, if they have one.
    Errors as in `load_reference`."""
    config = published_conventions(preset(preset_name))
    hidden, out = state_dict.get("projector.0.weight"), state_dict.get("projector.4.weight")
    if hidden is not None and out is not None and hidden.ndim == out.ndim == 2:
        config = replace(config, projector_width=hidden.shape[0], feature_width=out.shape[0])
    with torch.device("meta"):
        model = PackedTransformer(config)
    return load_weights(model, state_dict)


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file, by names without `WRAPPERS`. UserError where it is not there or not a file of weights."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: {path} is not a file")
    try:
        if path.suffix == ".safetensors":
            return dict(without_wrappers(load_file(path)))
        if path.suffix in TORCH_SUFFIXES:
            return _state_dict(torch.load(path, map_location="cpu", weights_only=True), path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"weights: {path} cannot be read as a {path.suffix} file of tensors: {error}") from error
    raise UserError(f"weights: {path} is not one of .safetensors, {', '.join(TORCH_SUFFIXES)}")


def write_weights(path: Path | str, state_dict: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, in the format of its ending."""
    path = Path(path)
    tensors = {key: value.contiguous() for key, value in state_dict.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    elif path.suffix in TORCH_SUFFIXES:
        torch.save(tensors, path)
    else:
        raise UserError(f"weights: {path} is not one of .safetensors, {', '.join(TORCH_SUFFIXES)}")


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    for nest in NESTS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nest), Mapping):
            loaded = loaded[nest]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"weights: {path} holds no state dict, that is, names and tensors")
    return dict(without_wrappers({str(key): value for key, value in loaded.items()}))
