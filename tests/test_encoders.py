"""Encoders with random weights, made here, against transformers' own forward of each image alone."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    RadioConfig,
    RadioModel,
)

from nitscale.encoders import load_encoder
from nitscale.errors import UserError
from nitscale.models.attention import attend

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "dinov2": (Dinov2Model, Dinov2Config(**SMALL, image_size=56, patch_size=14)),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SMALL, image_size=56, patch_size=14)),
    "radio": (RadioModel, RadioConfig(**SMALL, image_size=32, patch_size=16, max_img_size=64, num_registers=2)),
}
GRIDS = [(3, 2), (1, 4), (2, 3), (4, 4), (3, 2), (1, 1)]
"""Of mixed sizes; (3, 2) and (2, 3) have sequences of one length."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of an encoder of each kind, none of whose weights is zero."""
    root = tmp_path_factory.mktemp("encoders")
    generator = torch.Generator().manual_seed(0)
    for name, (kind, config) in KINDS.items():
        model = kind(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2, generator=generator)
        model.save_pretrained(root / name)
    return root


def pictures(grids, pixels=32):
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, rows * pixels, columns * pixels) for rows, columns in grids]
    return [torch.randint(0, 256, size, generator=generator, dtype=torch.uint8) for size in sizes]


def alone(folder, kind, picture, size):
    """Features of the patches of one image, (patches, Z), by transformers and nothing else."""
    model = kind.from_pretrained(folder).eval()
    pixels = F.interpolate(picture[None].float() / 255, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        if kind is RadioModel:
            return model(pixels).features[0]
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        patches = (size[0] // model.config.patch_size) * (size[1] // model.config.patch_size)
        return model((pixels - mean) / std).last_hidden_state[0, -patches:]


@pytest.mark.parametrize("name", KINDS)
def test_a_pack_of_mixed_sizes_gives_the_features_of_each_image_alone(folders, name):
    encoder = load_encoder(str(folders / name), attend)
    images, side = pictures(GRIDS), encoder.patch_size
    features = encoder.features(images, GRIDS)
    assert features.shape == (sum(rows * columns for rows, columns in GRIDS), 16) == (39, encoder.width)
    sizes = [(rows * side, columns * side) for rows, columns in GRIDS]
    parts = [alone(folders / name, KINDS[name][0], image, size) for image, size in zip(images, sizes, strict=True)]
    torch.testing.assert_close(features, torch.cat(parts), atol=1e-5, rtol=0)
    assert features.std() > 0.1
    assert not features.requires_grad


def test_oversampled_features_are_the_mean_over_the_patches_of_a_token(folders):
    encoder = load_encoder(str(folders / "dinov2"), attend, oversample=2)
    (image,) = pictures([(3, 2)])
    patches = alone(folders / "dinov2", Dinov2Model, image, (3 * 28, 2 * 28)).view(6, 4, 16)
    expected = torch.stack(
        [patches[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1)) for r in range(3) for c in range(2)]
    )
    torch.testing.assert_close(encoder.features([image], [(3, 2)]), expected, atol=1e-5, rtol=0)


def test_what_stands_in_a_cell_moves_the_features_of_that_token_most(folders):
    encoder = load_encoder(str(folders / "dinov2"), attend)
    grid = (3, 4)
    image = torch.zeros(3, 96, 128, dtype=torch.uint8)
    marked = image.clone()
    marked[:, 64:96, 32:64] = 255  # row 2, column 1
    change = (encoder.features([marked], [grid]) - encoder.features([image], [grid])).norm(dim=1)
    assert change.argmax() == 2 * 4 + 1


def test_images_of_the_encoders_own_size_are_not_resampled(folders, monkeypatch):
    encoder = load_encoder(str(folders / "radio"), attend)
    images = pictures([(2, 3)], pixels=16)
    expected = alone(folders / "radio", RadioModel, images[0], (32, 48))
    interpolate = F.interpolate
    shapes = []
    monkeypatch.setattr(F, "interpolate", lambda x, **k: shapes.append(x.shape[1]) or interpolate(x, **k))
    torch.testing.assert_close(encoder.features(images, [(2, 3)]), expected, atol=1e-5, rtol=0)
    assert 3 not in shapes  # only position embeddings


def test_bfloat16_is_close_to_float32(folders):
    full, half = (
        load_encoder(str(folders / "radio"), attend, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    images = pictures(GRIDS)
    features = half.features(images, GRIDS)
    assert features.dtype == torch.bfloat16
    assert F.cosine_similarity(features.float(), full.features(images, GRIDS)).min() > 0.98


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A folder as an older RADIO's: the model's code lies beside its weights, and leaves a trace when it runs."""
    folder = tmp_path / "radio-like"
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(
        "from collections import namedtuple\n"
        "import sys\n"
        "import torch\n"
        "from transformers import PreTrainedConfig, PreTrainedModel\n"
        "sys.radio_like_code_ran = True\n"
        "Output = namedtuple('Output', ['summary', 'features'])\n"
        "class TinyConfig(PreTrainedConfig):\n"
        "    pass\n"
        "class TinyModel(PreTrainedModel):\n"
        "    config_class = TinyConfig\n"
        "    patch_size = 8\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.patches = torch.nn.Conv2d(3, 6, 8, 8)\n"
        "        self.post_init()\n"
        "    def forward(self, x):\n"
        "        assert 0 <= x.min() and x.max() <= 1\n"
        "        features = self.patches(x).flatten(2).transpose(1, 2)\n"
        "        return Output(features.mean(1), features)\n"
    )
    auto_map = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map, "architectures": ["TinyModel"]}))
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn(6, 3, 8, 8, generator=generator), "bias": torch.zeros(6)}
    save_file({f"patches.{k}": v for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "radio_like_code_ran", False, raising=False)
    yield folder, weights["weight"]


def test_code_that_an_encoder_brings_along_runs_only_if_it_is_trusted(foreign):
    folder, weight = foreign
    with pytest.raises(UserError, match=r"modeling_tiny\.TinyModel.*trust_remote_code=true.*your account may do") as e:
        load_encoder(str(folder), attend)
    assert str(folder) in str(e.value)
    assert not sys.radio_like_code_ran
    encoder = load_encoder(str(folder), attend, trust_remote_code=True)
    assert sys.radio_like_code_ran
    assert (encoder.patch_size, encoder.width) == (8, 6)
    images = pictures(GRIDS, pixels=8)
    expected = [F.conv2d(image[None] / 255, weight, stride=8)[0].flatten(1).T for image in images]
    torch.testing.assert_close(encoder.features(images, GRIDS), torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_encoders_that_cannot_be_used_are_refused_with_the_reason(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'no-such/name' is no local folder, and the hub did not .* set HF_HOME"):
        load_encoder("no-such/name", attend)
    with pytest.raises(UserError, match=r"no readable config\.json"):
        load_encoder(str(tmp_path), attend)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="model of type 'bert'; give one of dinov2"):
        load_encoder(str(tmp_path), attend)
    (tmp_path / "config.json").write_bytes((folders / "dinov2" / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"cannot be loaded .*safetensors"):
        load_encoder(str(tmp_path), attend)


def test_weights_that_are_not_of_the_configuration_are_refused(folders, tmp_path):
    for file in (folders / "dinov2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"not those of its config\.json: \d+ tensors .* such as encoder\.layer\.2"):
        load_encoder(str(tmp_path), attend)
