"""The transformer: images of a pack know nothing of one another, and the weights begin as published."""

import random
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nitscale.errors import UserError
from nitscale.layout import PackLayout
from nitscale.models.transformer import ModelConfig, PackedTransformer, reorder
from tests.models.tiny import CONFIGS, FITV2, NIT, random_model

grids = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6)
MODELS = {name: random_model(options) for name, options in CONFIGS.items()}


def images(model: PackedTransformer, sizes: list[tuple[int, int]], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(rows * columns for rows, columns in sizes)
    x = torch.randn(tokens, model.config.token_features, generator=generator)
    t = torch.rand(len(sizes), generator=generator)
    labels = torch.randint(model.config.num_classes + 1, (len(sizes),), generator=generator)
    return x, t, labels


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to 1e-6 of the largest value."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= 1e-6 * max(float(b.abs().max()), 1.0)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(sizes=grids)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours_in_the_pack(name: str, sizes: list[tuple[int, int]]) -> None:
    model = MODELS[name]
    x, t, labels = images(model, sizes)
    together = model(x, t, labels, PackLayout.from_grids(sizes)).split([h * w for h, w in sizes])
    for i, (size, tokens) in enumerate(zip(sizes, x.split([h * w for h, w in sizes]), strict=True)):
        alone = model(tokens, t[i : i + 1], labels[i : i + 1], PackLayout.from_grids([size]))
        assert close(together[i], alone)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(sizes=grids, seed=st.integers(0, 99))
@torch.no_grad()
def test_an_image_does_not_depend_on_its_place_in_the_pack(name: str, sizes: list[tuple[int, int]], seed: int) -> None:
    model = MODELS[name]
    x, t, labels = images(model, sizes)
    order = random.Random(seed).sample(range(len(sizes)), len(sizes))
    lengths = [h * w for h, w in sizes]
    shuffled_x = torch.cat([x.split(lengths)[i] for i in order])
    straight = model(x, t, labels, PackLayout.from_grids(sizes)).split(lengths)
    layout = PackLayout.from_grids([sizes[i] for i in order])
    shuffled = model(shuffled_x, t[order], labels[order], layout)
    assert close(shuffled, torch.cat([straight[i] for i in order]))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=10, deadline=None)
@given(sizes=grids, padding=st.integers(1, 30))
@torch.no_grad()
def test_padding_the_pack_changes_nothing(name: str, sizes: list[tuple[int, int]], padding: int) -> None:
    model = MODELS[name]
    x, t, labels = images(model, sizes)
    plain = model(x, t, labels, PackLayout.from_grids(sizes))
    padded = model(
        torch.cat([x, x.new_full((padding, x.shape[1]), 1e3)]),
        torch.cat([t, t.new_zeros(1)]),
        torch.cat([labels, labels.new_zeros(1)]),
        PackLayout.from_grids([*sizes, (1, padding)]),
    )
    assert close(padded[: len(x)], plain)


def axes_swapped(model: PackedTransformer) -> PackedTransformer:
    """The same network with the rotary halves of rows and columns exchanged, and each patch transposed."""
    config = model.config
    swapped = PackedTransformer(config)
    state = model.state_dict()
    half = config.head_dim // 2
    for key, value in state.items():
        if ".qkv." in key:
            parts = value.unflatten(0, (config.heads, 3, config.head_dim)).clone()
            parts[:, :2] = parts[:, :2].roll(half, dims=2)
            state[key] = parts.flatten(0, 2)
        elif "q_norm" in key or "k_norm" in key:
            state[key] = value.roll(half)
        elif key == "position_embedding.out.weight":  # (centre, extent) x (row, column) x sinusoids
            state[key] = value.unflatten(1, (2, 2, -1)).flip(2).flatten(1)
    p = config.patch_size
    transposed = torch.arange(config.token_features).unflatten(0, (-1, p, p)).transpose(1, 2).flatten()
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, transposed]
    state["final_layer.out.weight"] = state["final_layer.out.weight"][transposed]
    state["final_layer.out.bias"] = state["final_layer.out.bias"][transposed]
    swapped.load_state_dict(state)
    return swapped


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6))
@torch.no_grad()
def test_transposing_an_image_commutes_with_swapping_the_axes(name: str, rows: int, columns: int) -> None:
    model = MODELS[name]
    swapped = axes_swapped(model)
    p = model.config.patch_size
    x, t, labels = images(model, [(rows, columns)])

    def transpose(tokens: Tensor, h: int, w: int) -> Tensor:
        return tokens.reshape(h, w, -1, p, p).permute(1, 0, 2, 4, 3).reshape(h * w, -1)

    straight = model(x, t, labels, PackLayout.from_grids([(rows, columns)]))
    across = swapped(transpose(x, rows, columns), t, labels, PackLayout.from_grids([(columns, rows)]))
    assert close(across, transpose(straight, rows, columns))


@torch.no_grad()
def test_rope_tells_rows_from_columns() -> None:
    model = MODELS["nit"]
    x, t, labels = images(model, [(2, 6)])
    wide = model(x, t, labels, PackLayout.from_grids([(2, 6)]))
    tall = model(x, t, labels, PackLayout.from_grids([(6, 2)]))
    assert not close(wide, tall)


@torch.no_grad()
def test_on_square_images_the_reference_order_is_a_transposition() -> None:
    model = MODELS["nit"]
    reference = PackedTransformer(replace(model.config, rope_order="reference"))
    reference.load_state_dict(model.state_dict())
    x, t, labels = images(model, [(4, 4)])
    layout = PackLayout.from_grids([(4, 4)])
    assert close(reference(x, t, labels, layout), axes_swapped(model)(x, t, labels, layout))


def test_the_other_direction_of_time_mirrors_time_and_velocity() -> None:
    model = MODELS["fitv2"]
    mirrored = PackedTransformer(replace(model.config, time_direction="noise_to_data"))
    mirrored.load_state_dict(model.state_dict())
    x, t, labels = images(model, [(3, 2), (2, 2)])
    layout = PackLayout.from_grids([(3, 2), (2, 2)])
    assert close(mirrored(x, 1 - t, labels, layout), -model(x, t, labels, layout))


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = PackedTransformer(ModelConfig(**FITV2))
    assert torch.equal(torch.get_rng_state(), before)
    second = PackedTransformer(ModelConfig(**FITV2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.initialize(1)
    assert not torch.equal(first.blocks[0].mlp.gate.weight, second.blocks[0].mlp.gate.weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_initialisation_is_the_published_one(name: str) -> None:
    model = PackedTransformer(ModelConfig(**{**CONFIGS[name], "width": 64}))
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "adaln.out" in key or key.startswith(("global_adaln", "final_layer")):
            assert parameter.eq(0).all(), key
        elif "_norm" in key:
            assert parameter.eq(1).all(), key
        elif key.startswith(("label_embedding", "time_embedding")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), key
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound <= parameter.abs().max().item() <= bound, key
    x, t, labels = images(model, [(2, 3)])
    assert model(x, t, labels, PackLayout.from_grids([(2, 3)])).eq(0).all()


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model = random_model(NIT)
    x, t, labels = images(model, [(2, 3), (4, 4), (2, 3)])
    layout = PackLayout.from_grids([(2, 3), (4, 4), (2, 3)])
    gradients = []
    for checkpointed in (False, True):
        model.checkpoint_blocks = checkpointed
        model.zero_grad()
        model(x, t, labels, layout).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradients_are_those_of_finite_differences() -> None:
    model = random_model({**FITV2, "depth": 1, "feature_block": 1}, torch.float64)
    x, t, labels = images(model, [(2, 2), (1, 3), (2, 2)])
    layout = PackLayout.from_grids([(2, 2), (1, 3), (2, 2)])

    def loss() -> Tensor:
        velocity, features = model(x, t, labels, layout, return_features=True)
        return velocity.square().mean() + features.square().mean()

    loss().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        direction = parameter.grad / parameter.grad.norm()
        with torch.no_grad():
            parameter += 1e-5 * direction
            above = loss()
            parameter -= 2e-5 * direction
            below = loss()
            parameter += 1e-5 * direction
        assert ((above - below) / 2e-5).item() == pytest.approx(parameter.grad.norm().item(), rel=1e-4), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_velocity_is_at_least_float32(dtype: torch.dtype) -> None:
    model = random_model(NIT, dtype)
    x, t, labels = images(model, [(2, 3)])
    layout = PackLayout.from_grids([(2, 3)])
    velocity = model(x, t.double(), labels, layout)
    assert velocity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (velocity - MODELS["nit"](x, t, labels, layout)).abs().max() <= (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_features_are_taken_where_the_configuration_says() -> None:
    x, t, labels = images(MODELS["nit"], [(2, 3), (1, 2)])
    layout = PackLayout.from_grids([(2, 3), (1, 2)])
    taps = [
        random_model({**NIT, "feature_block": block})(x, t, labels, layout, return_features=True)[1] for block in (1, 3)
    ]
    assert taps[0].shape == (8, 32)
    assert not close(*taps)
    projected = {**NIT, "feature_block": 1, "projector_width": 16, "feature_width": 7}
    assert random_model(projected)(x, t, labels, layout, return_features=True)[1].shape == (8, 7)
    with pytest.raises(UserError, match="feature_block"):
        MODELS["nit"](x, t, labels, layout, return_features=True)


@settings(max_examples=20, deadline=None)
@given(grids, st.integers(0, 9))
def test_a_reordered_layout_is_the_layout_of_the_reordered_images(sizes: list[tuple[int, int]], seed: int) -> None:
    order = random.Random(seed).sample(range(len(sizes)), len(sizes))
    reordered = asdict(reorder(PackLayout.from_grids(sizes), order))
    expected = asdict(PackLayout.from_grids([sizes[i] for i in order]))
    assert reordered.pop("lengths") == expected.pop("lengths")
    assert reordered.pop("max_seqlen") == expected.pop("max_seqlen")
    for key, value in expected.items():
        assert torch.equal(reordered[key], value) and reordered[key].dtype == value.dtype, key


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mlp": "relu"}, "mlp='relu'"),
        ({"width": 30}, "width=30"),
        ({"adaln": "lora"}, "adaln_rank"),
        ({"null_class": False}, "class_dropout=0.1"),
        ({"feature_block": 4}, "feature_block=4"),
        ({"projector_width": 8}, "feature_width"),
        ({"norm": "batch"}, "norm='batch'"),
    ],
)
def test_wrong_configurations_are_errors_that_name_the_field(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ModelConfig(**{**NIT, **options})


def test_inputs_that_do_not_fit_their_layout_are_errors_that_name_them() -> None:
    model = MODELS["nit"]
    x, t, labels = images(model, [(2, 3), (1, 2)])
    layout = PackLayout.from_grids([(2, 3), (1, 2)])
    for inputs, named in (
        ((x[:-1], t, labels), r"tokens is \(7, 4\), its layout needs \(8, 4\)"),
        ((torch.cat([x, x]), t, labels), r"tokens is \(16, 4\)"),
        ((x, t[:1], labels), r"t is \(1,\)"),
        ((x, t, labels[0]), r"labels is \(\)"),
    ):
        with pytest.raises(ValueError, match=named):
            model(*inputs, layout)
