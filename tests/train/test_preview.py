"""Previews: what is on the sheet, where it goes, and that it depends on the weights alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nitscale.data.manifest import Manifest, load_dataset
from nitscale.errors import UserError
from nitscale.flow.sampling import SamplerConfig, SampleRequest
from nitscale.generate.sample import sample_images
from nitscale.models.transformer import ModelConfig
from nitscale.pictures import to_pil
from nitscale.train import preview
from nitscale.train.preview import PreviewConfig, Previewer, common_sizes
from nitscale.train.process import Process
from tests.models.tiny import NIT, random_model

OPTIONS = {**NIT, "in_channels": 32, "num_classes": 8}
SAMPLING = SamplerConfig(steps=2, guidance=2.0, interval=(0.2, 0.9))
CONFIG = PreviewConfig(every=1, sizes=((32, 48), (64, 32)), classes=(1, 5), seeds=(0, 3), sampling=SAMPLING)
PROCESS = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def manifest(shapes_dataset: Path) -> Manifest:
    return load_dataset(shapes_dataset).manifest


def previewer(manifest: Manifest, run: Path, config: PreviewConfig = CONFIG, process: Process = PROCESS) -> Previewer:
    return Previewer(config, manifest, ModelConfig(**OPTIONS), process, run)


def contains(sheet: Image.Image, picture: Image.Image) -> bool:
    """Whether the picture is somewhere on the sheet, pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(sheet), np.asarray(picture).shape)
    corners = (windows[:, :, 0, 0, 0, 0] == np.asarray(picture)[0, 0, 0]).nonzero()
    return any((windows[y, x, 0] == np.asarray(picture)).all() for y, x in zip(*corners, strict=True))


def test_the_sheet_shows_what_sampling_gives(manifest: Manifest, tmp_path: Path, shapes_dataset: Path) -> None:
    model, codec = random_model(OPTIONS), load_dataset(shapes_dataset).codec()
    sheet = previewer(manifest, tmp_path).draw(12, model)
    requests = [SampleRequest(h, w, label, s) for h, w in CONFIG.sizes for s in CONFIG.seeds for label in (1, 5)]
    for _, _, image in sample_images(model, codec, requests, SAMPLING, progress=False):
        assert contains(sheet, to_pil(image))
    with Image.open(tmp_path / "previews" / "step-00000012.png") as file:
        assert (np.asarray(file) == np.asarray(sheet)).all()


def test_a_preview_is_repeated_exactly_and_changes_with_the_weights(manifest: Manifest, tmp_path: Path) -> None:
    model, drawer = random_model(OPTIONS), previewer(manifest, tmp_path)
    first, again = drawer.sample(model), drawer.sample(model)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        model.final_layer.out.bias += 0.1
    assert not any(torch.equal(a, b) for a, b in zip(first, drawer.sample(model), strict=True))
    assert [tuple(latent.shape) for latent in first] == [(32, 2, 3)] * 4 + [(32, 4, 2)] * 4


def test_without_the_codec_latent_channels_are_shown_and_said_once(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = replace(manifest, codec=manifest.codec | {"id": "autoencoder-dc", "source": "/nowhere"})
    drawer = previewer(gone, tmp_path)
    assert capsys.readouterr().out.count("preview: latent channels are shown instead of pictures") == 1
    sheet = drawer.draw(1, random_model(OPTIONS))
    latent = drawer.sample(random_model(OPTIONS))[0]
    assert contains(sheet, to_pil(latent[:3].repeat_interleave(16, 1).repeat_interleave(16, 2) / 3))


def test_weights_that_are_not_finite_do_not_end_the_run(manifest: Manifest, tmp_path: Path) -> None:
    drawer, model = previewer(manifest, tmp_path), random_model(OPTIONS)
    with torch.no_grad():
        model.patch_embedding.bias.fill_(float("nan"))
    captions = [caption for row in drawer.rows(drawer.sample(model)) for caption in row.captions]
    assert len(captions) == 8 and all(caption.endswith(": not finite") for caption in captions)


def test_sizes_and_classes_are_the_datasets_unless_given(manifest: Manifest, tmp_path: Path) -> None:
    requests = previewer(manifest, tmp_path, PreviewConfig(every=1)).requests
    counts = {tuple(int(n) * 16 for n in name.split("x")): count for name, count in manifest.grids.items()}
    sizes = list(dict.fromkeys((request.height, request.width) for request in requests))
    assert len(sizes) == 4 and len(requests) == 4 * 8
    assert min(counts[size] for size in sizes) >= max(counts[size] for size in counts.keys() - set(sizes))
    assert all(h % 32 == 0 and w % 32 == 0 for h, w in common_sizes(manifest, 32))


def test_a_size_beyond_the_token_budget_gets_a_pack_of_its_own(manifest: Manifest, tmp_path: Path) -> None:
    sampling = replace(SAMPLING, token_budget=10)
    small, large = (previewer(manifest, tmp_path, replace(CONFIG, sampling=s)) for s in (sampling, SAMPLING))
    model = random_model(OPTIONS)
    for a, b in zip(small.sample(model), large.sample(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_model_without_null_class_is_sampled_without_guidance(manifest: Manifest, tmp_path: Path) -> None:
    options = {**OPTIONS, "null_class": False, "class_dropout": 0.0}
    drawer = Previewer(CONFIG, manifest, ModelConfig(**options), PROCESS, tmp_path)
    assert len(drawer.sample(random_model(options))) == 8


def test_a_size_that_the_codec_cannot_have_is_refused_at_the_start(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preview: size 33x48 must be multiples of 16 pixels .*e.g. 32x48"):
        previewer(manifest, tmp_path, replace(CONFIG, sizes=((33, 48),)))
    with pytest.raises(UserError, match="preview: class 8 is not among 0 to 7"):
        previewer(manifest, tmp_path, replace(CONFIG, classes=(8,)))


def test_the_codec_is_loaded_on_the_first_rank_alone(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(preview, "codec_from_spec", lambda spec: loaded.append(spec))
    previewer(manifest, tmp_path, process=Process(1, 2, torch.device("cpu")))
    assert loaded == []
