"""Files of published weights: import, sample, export."""

import json
from pathlib import Path

import pytest
import torch

from nitscale.errors import UserError
from nitscale.flow.guidance import Guidance, GuidedVelocity
from nitscale.flow.samplers import euler
from nitscale.layout import PackLayout
from nitscale.models import presets
from nitscale.models.reference import load_reference, save_reference
from nitscale.models.weights import import_weights, read_weights, write_weights
from tests.models.tiny import random_model
from tests.published import FOLDER


@pytest.mark.parametrize("name", ["nit-xl", "fitv2-xl"])
def test_a_released_checkpoint_is_imported_sampled_and_exported_unchanged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random tensors under the released names; of the released blocks, two."""
    monkeypatch.setitem(presets.PRESETS, name, presets.preset(name, depth=2, feature_block=None))
    file = "keys_nit_xl_pack_merge_radio_16384" if name == "nit-xl" else "keys_config_fitv2_xl"
    if name == "nit-xl":
        monkeypatch.setitem(presets.PRESETS, name, presets.preset(name, feature_block=1))
    keys = json.loads((FOLDER / f"{file}.json").read_text())
    generator = torch.Generator().manual_seed(0)
    released = {
        key: 0.02 * torch.randn(shape, generator=generator, dtype=torch.float32)
        for key, shape in keys.items()
        if not key.startswith("blocks.") or int(key.split(".")[1]) < 2
    }
    write_weights(tmp_path / "released.safetensors", released)

    model = import_weights(name, read_weights(tmp_path / "released.safetensors"))
    config = model.config
    layout = PackLayout.from_grids([(2, 3), (3, 1)])
    guidance = Guidance(2.0, (0.0, 0.7), channels=3 if config.published_as == "fit" else None)
    labels = torch.tensor([7, 207])
    velocity = GuidedVelocity(model, labels, layout, guidance, null_label=1000, patch_size=config.patch_size)
    sample = euler(velocity, torch.randn(9, config.token_features, generator=generator), layout, num_steps=2)
    assert sample.isfinite().all()

    write_weights(tmp_path / "exported.safetensors", save_reference(model))
    assert (tmp_path / "exported.safetensors").read_bytes() == (tmp_path / "released.safetensors").read_bytes()


def test_torch_files_are_read_with_their_usual_nests(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16)}
    for suffix, content in (
        (".bin", tensors),
        (".pt", {"state_dict": tensors, "step": 3}),
        (".pth", {"model": {f"module.{key}": value for key, value in tensors.items()}}),
        (".pt", {"model": {"a.weight": torch.zeros(2)}, "ema": tensors, "opt": {}}),
    ):
        path = tmp_path / f"weights{suffix}"
        torch.save(content, path)
        read = read_weights(path)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    write_weights(tmp_path / "weights.safetensors", {f"ema.module.{key}": value for key, value in tensors.items()})
    assert read_weights(tmp_path / "weights.safetensors").keys() == tensors.keys()


class Surprise:
    """Something that a file of weights has no business holding."""


def test_files_that_are_no_weights_are_errors_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not a header")
    (tmp_path / "broken.pt").write_bytes(b"neither")
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    torch.save({"a": Surprise()}, tmp_path / "object.bin")
    (tmp_path / "weights.onnx").write_bytes(b"")
    for name in ("missing.pt", "broken.safetensors", "broken.pt", "numbers.pt", "object.bin", "weights.onnx"):
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)


def test_weights_of_another_preset_are_refused() -> None:
    state = save_reference(random_model({"width": 32, "depth": 1, "heads": 2}))
    with pytest.raises(UserError, match=r"missing: blocks\.1"):
        import_weights("nit-s", state)


def test_loading_copies_the_weights() -> None:
    model = random_model({"width": 32, "depth": 1, "heads": 2})
    state = save_reference(model)
    config = {
        "patch_size": 1,
        "in_channels": 32,
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "qk_norm": True,
        "encoder_depth": 1,
    }
    loaded = load_reference("nit", config, state)
    with torch.no_grad():
        loaded.patch_embedding.bias.add_(1)
    assert torch.equal(state["x_embedder.proj.bias"], model.patch_embedding.bias)
