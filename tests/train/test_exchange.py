"""Published weights in and out through the command line's functions."""

import json
from pathlib import Path

import pytest
import torch

from nitscale.checkpoints import find_weights
from nitscale.dct import DCTCodec
from nitscale.errors import UserError
from nitscale.generate.load import load_trained
from nitscale.models import presets
from nitscale.models.reference import save_reference
from nitscale.models.transformer import PackedTransformer
from nitscale.models.weights import read_weights, write_weights
from nitscale.train.exchange import consolidate_checkpoint, export_checkpoint, import_checkpoint


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of random weights under the published names of a NiT of two narrow blocks."""
    small = presets.preset("nit-s", depth=2, width=32, heads=2, num_classes=5, feature_block=None)
    monkeypatch.setitem(presets.PRESETS, "nit-s", small)
    model = PackedTransformer(small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    write_weights(tmp_path / "published.safetensors", save_reference(model))
    return tmp_path / "published.safetensors"


def test_imported_and_exported_weights_are_the_same_file(published: Path, tmp_path: Path) -> None:
    assert "imported as nit-s" in import_checkpoint(published, "nit-s", tmp_path / "imported")
    find_weights(tmp_path / "imported").verify()
    export_checkpoint(tmp_path / "imported", tmp_path / "exported.safetensors")
    assert (tmp_path / "exported.safetensors").read_bytes() == published.read_bytes()
    export_checkpoint(tmp_path / "imported", tmp_path / "exported.pt")
    assert read_weights(tmp_path / "exported.pt").keys() == read_weights(published).keys()


def test_the_averaged_weights_of_a_run_are_exported_under_the_published_names(
    trained_run: Path, tmp_path: Path
) -> None:
    export_checkpoint(trained_run, tmp_path / "run.safetensors")
    exported = read_weights(tmp_path / "run.safetensors")
    expected = save_reference(load_trained(trained_run).model)
    assert exported.keys() == expected.keys() and "blocks.1.adaLN_modulation.1.weight" in exported
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_wrong_imports_are_named_and_leave_nothing(published: Path, tmp_path: Path) -> None:
    weights = read_weights(published)
    weights["surplus"] = weights.pop("x_embedder.proj.bias")
    write_weights(tmp_path / "other.safetensors", weights)
    with pytest.raises(UserError, match=r"(?s)x_embedder\.proj\.bias.*surplus"):
        import_checkpoint(tmp_path / "other.safetensors", "nit-s", tmp_path / "out")
    with pytest.raises(UserError, match="preset 'nit-m' is unknown"):
        import_checkpoint(published, "nit-m", tmp_path / "out")
    with pytest.raises(UserError, match="is not a file"):
        import_checkpoint(tmp_path / "absent.safetensors", "nit-s", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    import_checkpoint(published, "nit-s", tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        import_checkpoint(published, "nit-s", tmp_path / "out")


def test_sampling_needs_the_checkpoint_and_its_autoencoder_alone(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_checkpoint(published, "nit-s", tmp_path / "imported")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub did not give mit-han-lab/dc-ae-f32c32-sana"):
        load_trained(tmp_path / "imported")
    monkeypatch.setattr("nitscale.autoencoders.load_codec", lambda source: DCTCodec(32, 32) if source == "dc" else None)
    monkeypatch.setenv("NITSCALE_CODEC", "dc")
    assert load_trained(tmp_path / "imported").codec.channels == 32
    about = json.loads((tmp_path / "imported" / "model.json").read_text())
    assert about["model"]["rope_order"] == "reference" and len(about["classes"]) == 5


def test_a_consolidated_checkpoint_has_the_same_weights_whole(trained_run, tmp_path):
    run = find_weights(trained_run)
    for which in (None, "model", "0.9"):
        out = tmp_path / f"whole-{which}"
        assert "step 8 of" in consolidate_checkpoint(trained_run, out, which)
        whole = find_weights(out)
        whole.verify()
        assert whole.model() == run.model() and whole.step == 8
        expected = run.weights(which)
        assert whole.weights().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in whole.weights().items())
    with pytest.raises(UserError, match="averaged weights only, not 'model'"):
        find_weights(tmp_path / "whole-None").weights("model")
    with pytest.raises(UserError, match="already exists"):
        consolidate_checkpoint(trained_run, tmp_path / "whole-None")
