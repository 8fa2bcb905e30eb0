"""Published weights: the published numbers, and the way in and out."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from nitscale.errors import UserError
from nitscale.flow.guidance import Guidance, GuidedVelocity
from nitscale.layout import PackLayout, unpatchify
from nitscale.models.reference import load_reference, reference_config, save_reference
from nitscale.models.transformer import PackedTransformer
from tests.models.plain import plain_output
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
            if output == "prediction" and "out.unpatchify0" in tensors:
                of_first = unpatchify(-velocity[: layout.lengths[0]], about["sizes_hw"][0], model.config.patch_size)
                assert difference(of_first, tensors["out.unpatchify0"]) <= TOLERANCE[dtype]

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


NTK = {"custom_freqs": "ntk-aware", "ori_max_pe_len": 2}
FIT_CASES = [
    ({"adaln_type": "swiglu", "mlp_ratio": 3.5}, {}),
    ({"adaln_type": "lora", "adaln_lora_dim": 4, "adaln_bias": False, "ffn_bias": False, "qkv_bias": False}, {}),
    ({"use_swiglu": False, "q_norm": "layernorm", "k_norm": "layernorm", "qk_norm_weight": True}, {}),
    ({"norm_type": "w_layernorm", "q_norm": "w_rmsnorm", "k_norm": "w_rmsnorm", "add_rel_pe_to_v": True}, {}),
    ({"norm_type": "none", "use_swiglu_large": True, "rel_pos_embed": "RoPE", "class_dropout_prob": 0.0}, {}),
    ({"rope_theta": 100.0, "time_shifting": 3, "patch_size": 1}, {"theta": 100.0}),
    (
        {**NTK, "online_rope": True, "decouple": True},
        {"extrapolation": "ntk", "train_grid": 2, "decoupled": True},
    ),
    (
        {**NTK, "custom_freqs": "Yarn", "max_pe_len_h": 8, "max_pe_len_w": 4},
        {"extrapolation": "yarn", "magnitude": "mscale", "train_grid": 2, "decoupled": False, "test_grid": (8, 4)},
    ),
]
NIT_CASES = [
    ({}, {}),
    ({"use_adaln_lora": True, "adaln_lora_dim": 4, "qk_norm": True, "patch_size": 1, "theta": 100}, {"theta": 100}),
    (
        {**NTK, "custom_freqs": "scale2", "max_pe_len_h": 4, "max_pe_len_w": 8},
        {"magnitude": "proportion2", "train_grid": 2, "test_grid": (4, 8)},
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "options", "rope"), [("fit", *case) for case in FIT_CASES] + [("nit", *case) for case in NIT_CASES]
)
def test_every_option_gives_the_network_written_out_plainly(
    family: str, options: dict[str, Any], rope: dict[str, Any], dtype: torch.dtype
) -> None:
    small = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 3, "in_channels": 3}
    if family == "nit":
        config = {**small, "encoder_depth": 1, "projector_dim": 8, "z_dim": 5, **options}
        rope = {**rope, "order": "reference"}
    else:
        config = {**small, "learn_sigma": False, "use_sit": True, "use_swiglu": True, **options}
    state = save_reference(random_model(family, config))
    model = load_reference(family, config, {key: value.to(dtype) for key, value in state.items()})

    sizes = [(2, 3), (1, 4), (5, 4), (2, 3)]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(36, model.config.token_features, generator=generator)
    t, y = torch.tensor([0.2, 0.9, 0.0, 1.0]), torch.tensor([0, 2, 1, 2])
    exact = {key: value.double().requires_grad_() for key, value in state.items()}
    layout = PackLayout.from_grids(sizes)
    if family == "nit":
        expected, expected_features = plain_output(config, exact, x.double(), t, y, sizes, **rope)
        velocity, features = model(x, t, y, layout, return_features=True)
        assert difference(features, expected_features.detach()) <= TOLERANCE[dtype]
        (features.square().mean() + velocity.square().mean()).backward()
        (expected_features.square().mean() + expected.square().mean()).backward()
    else:
        expected = -plain_output(config, exact, x.double(), 1 - t, y, sizes, **rope)[0]
        velocity = model(x, t, y, layout)
        velocity.square().mean().backward()
        expected.square().mean().backward()
    assert difference(velocity, expected.detach()) <= TOLERANCE[dtype]
    gradients = save_reference(model, gradients=True)
    assert gradients.keys() == state.keys()
    largest = max(float(value.grad.abs().max()) for value in exact.values())
    for key, gradient in gradients.items():
        assert (gradient.double() - exact[key].grad).abs().max() <= TOLERANCE[dtype] * largest, key
    again = save_reference(model)
    assert all(torch.equal(again[key], state[key].to(dtype)) for key in state) and list(again) == list(state)


def test_noise_and_variance_of_the_ddpm_objective_come_at_the_steps_of_its_schedule() -> None:
    config = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "in_channels": 3, "use_swiglu": True}
    model = random_model("fit", config)
    state = {key: value.double() for key, value in save_reference(model).items()}
    x = torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    t, y, sizes = torch.tensor([0.25, 0.999]), torch.tensor([0, 2]), [(2, 3), (1, 4)]
    output = model(x, t, y, PackLayout.from_grids(sizes))
    expected = plain_output(config, state, x.double(), t, y, sizes)[0]
    assert output.shape == (10, 24)
    assert difference(output, expected) <= 2e-5


def test_weights_of_a_projector_behind_no_block_are_kept() -> None:
    config = {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "projector_dim": 8, "z_dim": 5}
    state = save_reference(random_model("nit", config))  # the published default is encoder_depth=4
    model = load_reference("nit", config, state)
    layout, x = PackLayout.from_grids([(2, 3)]), torch.randn(6, 16)
    model(x, torch.tensor([0.5]), torch.tensor([1]), layout)
    with pytest.raises(UserError, match="feature_block"):
        model(x, torch.tensor([0.5]), torch.tensor([1]), layout, return_features=True)
    saved = save_reference(model)
    assert saved.keys() == state.keys() and torch.equal(saved["projector.4.weight"], state["projector.4.weight"])


def test_prefixes_of_wrappers_are_left_out_and_dtypes_made_one() -> None:
    about, tensors = golden("nit_c2i_p2")
    weights = {key.removeprefix("weights."): value.float() for key, value in tensors.items() if "weights." in key}
    wrapped = {f"ema_model._orig_mod.{key}": value.half() if "proj" in key else value for key, value in weights.items()}
    model = load_reference("nit", about["config"], wrapped)
    prediction = model(tensors["in.x"].flatten(1), tensors["in.t"], tensors["in.y"], nit_layout(tensors))
    assert difference(prediction, tensors["out.prediction"]) <= 2e-5
    assert save_reference(model).keys() == weights.keys()


def random_model(family: str, config: dict[str, Any]) -> PackedTransformer:
    model = PackedTransformer(reference_config(family, config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name and name.endswith(".weight")
            parameter.normal_(1.0 if is_scale else 0.0, 0.2, generator=generator)
    return model
