"""Published weights: the published numbers, and the way in and out."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from nitscale.errors import UserError
from nitscale.flow.guidance import Guidance, GuidedVelocity
from nitscale.models.reference import load_reference, reference_config, save_reference
from nitscale.models.transformer import PackedTransformer
from tests.published import (
    FOLDER,
    TOLERANCE,
    difference,
    fit_layout,
    golden,
    names,
    nit_layout,
    norms,
    published_model,
)

DTYPES = [torch.float32, torch.float64]
KEY_LISTS = {
    "keys_nit_xl_pack_merge_radio_16384": ("nit", "nit", "nit_xl_pack_merge_radio_16384"),
    "keys_config_fitv2_xl": ("fit", "fit", "config_fitv2_xl"),
    "keys_config_fitv2_3B": ("fit", "fit", "config_fitv2_3B"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names("nit_c2i_*"))
def test_nit_gives_the_published_forward_features_and_gradients(name: str, dtype: torch.dtype) -> None:
    about, tensors = golden(name)
    model = published_model("nit", name, dtype)
    x, layout = tensors["in.x"].flatten(1), nit_layout(tensors)
    prediction, features = model(x, tensors["in.t"], tensors["in.y"], layout, return_features=True)
    assert difference(prediction, tensors["out.prediction"]) <= TOLERANCE[dtype]
    assert difference(features, tensors["out.zs"]) <= TOLERANCE[dtype]

    losses = {"pred": prediction.square().mean()}
    losses["pred_plus_zs"] = losses["pred"] + features.square().mean()
    for case, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients = save_reference(model, gradients=True)
        expected = tensors[f"out.grad_norms.{case}"]
        actual = norms(gradients, about["param_names"])
        assert torch.equal(actual.isnan(), expected.isnan())
        assert ((actual - expected).abs() / expected).nan_to_num().max() <= TOLERANCE[dtype]
        if case == "pred":
            key = "blocks.1.attn.qkv.weight"
            assert difference(gradients[key], tensors[f"out.grad.{key}"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", [name for name in names("nit_c2i_*") if "out.prediction_rowmajor" in golden(name)[1]])
def test_nit_in_row_major_order_gives_the_published_network_on_true_coordinates(name: str) -> None:
    _, tensors = golden(name)
    published = published_model("nit", name, torch.float32)
    model = PackedTransformer(replace(published.config, rope_order="row_major"))
    model.load_state_dict(published.state_dict())
    x, layout = tensors["in.x"].flatten(1), nit_layout(tensors)
    prediction, features = model(x, tensors["in.t"], tensors["in.y"], layout, return_features=True)
    assert difference(prediction, tensors["out.prediction_rowmajor"]) <= 2e-5
    assert difference(features, tensors["out.zs_rowmajor"]) <= 2e-5


FIT_OPTIONS = {
    "prediction": {},
    "prediction_online_ntkaware_decouple": {
        "online_rope": True,
        "custom_freqs": "ntk-aware",
        "ori_max_pe_len": 4,
        "decouple": True,
    },
    "prediction_online_ntkaware_coupled": {"online_rope": True, "custom_freqs": "ntk-aware", "ori_max_pe_len": 4},
    "prediction_time_shifting3": {"time_shifting": 3},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names("fit*_v*") + names("fitv2"))
def test_fit_gives_the_published_numbers_of_padded_batches_as_packs(name: str, dtype: torch.dtype) -> None:
    about, tensors = golden(name)
    real, layout = tensors["in.mask"].bool(), fit_layout(tensors["in.size"])
    x, t = tensors["in.x"][real], 1 - tensors["in.t"]  # their time runs from noise to data, and so does their velocity
    for output, options in FIT_OPTIONS.items():
        if f"out.{output}" in tensors:
            model = published_model("fit", name, dtype, **options)
            velocity = model(x, t, tensors["in.y"], layout)
            assert difference(-velocity, tensors[f"out.{output}"][real]) <= TOLERANCE[dtype], output

    model = published_model("fit", name, dtype)
    (model(x, t, tensors["in.y"], layout).square().sum() / tensors["in.x"].numel()).backward()
    gradients, expected = save_reference(model, gradients=True), tensors["out.grad_norms"]
    assert ((norms(gradients, about["param_names"]) - expected).abs() / expected).max() <= TOLERANCE[dtype]
    key = "blocks.1.attn.qkv.weight"
    assert difference(gradients[key], tensors[f"out.grad.{key}"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", [name for name in names("fit*") if "out.cfg" in golden(name)[1]])
def test_fit_is_guided_on_three_channels_as_published(name: str) -> None:
    about, tensors = golden(name)
    real, layout = tensors["in.mask"].bool(), fit_layout(tensors["in.size"])
    model = published_model("fit", name, torch.float64)
    for output, power in (("cfg", 0.0), ("cfg_scale_pow1.5", 1.5)):
        guidance = Guidance(about["cfg_scale"], channels=3, power=power)
        null = about["config"]["num_classes"]
        guided = GuidedVelocity(model, tensors["in.y_cond"], layout, guidance, null_label=null, patch_size=2)
        velocity = guided(tensors["in.x"][real], 1 - tensors["in.t"])
        assert difference(-velocity, tensors[f"out.{output}"][: len(real)][real]) <= 1e-6


@pytest.mark.parametrize("name", names("nit_c2i_*") + names("fitv2") + names("fit_v1ish"))
def test_weights_come_back_under_their_names_unchanged(name: str) -> None:
    about, tensors = golden(name)
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if "weights." in key}
    saved = save_reference(load_reference(name[:3], about["config"], weights))
    assert list(saved) == about["param_names"]
    assert all(torch.equal(saved[key], weights[key]) and saved[key].dtype == weights[key].dtype for key in weights)


@pytest.mark.parametrize("key_list", KEY_LISTS)
def test_a_released_checkpoint_goes_in_and_out_unchanged(key_list: str) -> None:
    family, group, entry = KEY_LISTS[key_list]
    config = json.loads((FOLDER / "configs.json").read_text())[group][entry]["network"]
    keys = json.loads((FOLDER / f"{key_list}.json").read_text())
    released = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    saved = save_reference(load_reference(family, config, released))
    assert {key: list(value.shape) for key, value in saved.items()} == keys


def test_keys_that_do_not_fit_are_all_listed() -> None:
    about, tensors = golden("nit_c2i_p2")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if "weights." in key}
    del weights["blocks.0.attn.proj.bias"], weights["projector.2.weight"]
    weights["blocks.2.attn.qkv.bias"] = torch.zeros(3)
    weights["t_embedder.mlp.2.bias"] = torch.zeros(5)
    with pytest.raises(UserError) as error:
        load_reference("nit", about["config"], weights)
    message = str(error.value)
    assert "4 keys" in message
    assert "missing: blocks.0.attn.proj.bias (32,)" in message
    assert "missing: projector.2.weight (48, 48)" in message
    assert "surplus: blocks.2.attn.qkv.bias (3,)" in message
    assert "wrong shape: t_embedder.mlp.2.bias is (5,), the model needs (32,)" in message


def test_nit_without_its_projector_loads_and_gives_the_features_of_its_block() -> None:
    about, tensors = golden("nit_c2i_p2")
    weights = {key.removeprefix("weights."): value.float() for key, value in tensors.items() if "weights." in key}
    weights = {key: value for key, value in weights.items() if not key.startswith("projector")}
    model = load_reference("nit", about["config"], weights)
    x, layout = tensors["in.x"].flatten(1), nit_layout(tensors)
    prediction, features = model(x, tensors["in.t"], tensors["in.y"], layout, return_features=True)
    assert difference(prediction, tensors["out.prediction"]) <= 2e-5
    assert features.shape == (27, 32)
    assert list(save_reference(model)) == [key for key in about["param_names"] if not key.startswith("projector")]


def test_arguments_unknown_to_the_published_code_are_ignored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="no argument 'hiden_size'.*'hidden_size'"):
        reference_config("nit", {"hiden_size": 64})


def test_options_that_are_not_supported_are_errors() -> None:
    for options, named in (
        ({"rel_pos_embed": "abs"}, "rel_pos_embed='abs'"),
        ({"q_norm": "layernorm"}, "q_norm='layernorm' and k_norm=None"),
        ({"custom_freqs": "ntk"}, "custom_freqs='ntk'"),
        ({"custom_freqs": "yarn"}, "max_pe_len_h"),
        ({"use_sit": True}, "learn_sigma and use_sit"),
    ):
        with pytest.raises(UserError, match=named):
            reference_config("fit", options)
    with pytest.raises(UserError, match="'dit'"):
        reference_config("dit", {})


@pytest.mark.parametrize(
    "options",
    [
        {"adaln_type": "swiglu"},
        {"adaln_type": "lora", "adaln_lora_dim": 4, "adaln_bias": False, "ffn_bias": False, "qkv_bias": False},
        {"use_swiglu": False, "q_norm": "layernorm", "k_norm": "layernorm", "qk_norm_weight": True},
        {"norm_type": "w_layernorm", "q_norm": "w_rmsnorm", "k_norm": "w_rmsnorm", "add_rel_pe_to_v": True},
        {"learn_sigma": True, "use_sit": False, "class_dropout_prob": 0.0},
    ],
)
def test_every_option_of_fit_goes_in_and_out(options: dict[str, Any]) -> None:
    small = {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "learn_sigma": False, "use_sit": True}
    config = {**small, "use_swiglu": True, **options}
    fresh = random_fit(config)
    again = load_reference("fit", config, save_reference(fresh))
    layout = fit_layout(torch.tensor([[[2, 3]], [[1, 4]]]))
    x, t, y = torch.randn(10, 16), torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    output = fresh(x, t, y, layout)
    assert output.shape == (10, 32 if config["learn_sigma"] else 16)
    assert torch.equal(output, again(x, t, y, layout))


def random_fit(config: dict[str, Any]) -> PackedTransformer:
    model = PackedTransformer(reference_config("fit", config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model
