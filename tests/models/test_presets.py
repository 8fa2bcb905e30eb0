"""The published models have the published numbers of parameters."""

import json
from dataclasses import replace

import pytest
import torch

from nitscale.errors import UserError
from nitscale.models.flops import forward_flops, training_flops
from nitscale.models.presets import PRESETS, preset
from nitscale.models.reference import published_conventions, reference_config
from nitscale.models.transformer import ModelConfig, PackedTransformer
from tests.published import FOLDER

PUBLISHED = json.loads((FOLDER / "configs.json").read_text())
COUNTS = {
    "nit-s": 32_874_272,
    "nit-b": 130_331_168,
    "nit-l": 457_863_200,
    "nit-xl": 674_861_216,
    "nit-xxl": 1_362_730_016,
    "fitv2-b": 128_149_072,
    "fitv2-xl": 671_045_776,
    "fitv2-3b": 2_971_928_080,
    "fitv2-b-hr": 128_149_072,
    "fitv2-xl-hr": 671_045_776,
    "fitv2-3b-hr": 2_971_928_080,
    "fit-xl": 823_599_392,
}


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in PackedTransformer(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert parameters(preset(name)) == COUNTS[name]


@pytest.mark.parametrize("entry", PUBLISHED["nit"])
def test_nit_presets_are_the_published_configurations(entry: str) -> None:
    published = reference_config("nit", PUBLISHED["nit"][entry]["network"])
    assert parameters(published) == PUBLISHED["nit"][entry]["params_total"]
    without_projector = replace(published, projector_width=None, feature_width=None)
    assert published_conventions(preset(f"nit-{entry.split('_')[1]}")) == replace(without_projector, mlp_width=None)


@pytest.mark.parametrize("entry", PUBLISHED["fit"])
def test_fit_presets_are_the_published_configurations(entry: str) -> None:
    published = reference_config("fit", PUBLISHED["fit"][entry]["network"])
    assert parameters(published) == PUBLISHED["fit"][entry]["params_total"]
    family = "fitv2" if "v2" in entry else "fit"
    size = entry.split(" ")[0].lower().removeprefix("config_").removeprefix(family).strip("_").split("_")
    name = f"{family}-{size[-1]}-hr" if size[0] == "hr" else f"{family}-{size[0]}"
    assert published_conventions(preset(name)) == replace(published, rope_train_grid=16)


def test_an_unknown_preset_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'fitv2-xl'"):
        preset("fitv2_xl")
    assert preset("nit-s", num_classes=10).num_classes == 10


def test_flops_are_those_of_the_matrix_products() -> None:
    # per token and block 12 D² multiply-adds, 2 n² D of attention, and 6 D² an image
    config = ModelConfig(in_channels=4, width=32, depth=3, heads=2, num_classes=5)
    per_token = 3 * 12 * 32**2 + 2 * 4 * 32
    per_image = 3 * 6 * 32**2 + (256 + 32) * 32 + 2 * 32**2
    attention = 3 * 2 * (25 + 49) * 32
    assert forward_flops(config, [5, 7]) == 2 * (12 * per_token + 2 * per_image + attention)
    assert training_flops(config, [5, 7]) == 3 * forward_flops(config, [5, 7])
