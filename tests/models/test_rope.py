"""Rotary positions: the published tables to the bit, and laws that hold for all images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale.errors import UserError
from nitscale.layout import PackLayout
from nitscale.models.reference import ROPE_MODES
from nitscale.models.rope import (
    EXTRAPOLATIONS,
    MAGNITUDES,
    apply_rope,
    axis_frequencies,
    base_frequencies,
    magnitude_factor,
    rope_tables,
    token_coordinates,
)
from tests.published import golden

grids = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5)


def options_of(mode: str, coupling: str) -> dict[str, object]:
    extrapolation, magnitude = ROPE_MODES[mode]
    decoupled = coupling.startswith("decouple")
    return {"extrapolation": extrapolation, "magnitude": magnitude, "decoupled": decoupled}


def repeated(table: torch.Tensor) -> torch.Tensor:
    """The published layout of a table: each pair's value twice."""
    return table.repeat_interleave(2, dim=1)


def test_tables_are_those_of_the_published_code() -> None:
    about, tensors = golden("fitv2_rope")
    keys = [key.removesuffix(".cos") for key in tensors if key.endswith(".cos") and ".online." not in key]
    assert keys
    for key in keys:
        _, _, head_dim, mode, coupling, size = key.split(".")
        rows, columns = map(int, size.split("x"))
        # another image first: extrapolation must be each image's own
        layout = PackLayout.from_grids([(3, 5), (rows, columns)])
        tables = rope_tables(
            layout,
            int(head_dim.removeprefix("hd")),
            theta=about["theta"],
            train_grid=about["ori_max_pe_len"],
            **options_of(mode, coupling),
        )
        tokens = 15 + tensors[f"in.tokens.{size}"]
        for table, part in zip(tables, ("cos", "sin"), strict=True):
            assert (repeated(table[tokens]) - tensors[f"{key}.{part}"]).abs().max() <= 1e-6, key


def test_tables_of_a_pack_are_those_of_the_published_online_mode() -> None:
    about, tensors = golden("fitv2_rope")
    grid, size = tensors["in.online.grid"].long(), tensors["in.online.size"][:, 0]
    layout = PackLayout.from_grids(size.tolist())
    keys = [key.removesuffix(".batch.cos") for key in tensors if key.endswith(".batch.cos")]
    assert keys
    for key in keys:
        _, _, head_dim, mode, coupling = key.split(".")
        tables = rope_tables(
            layout,
            int(head_dim.removeprefix("hd")),
            theta=about["theta"],
            train_grid=about["ori_max_pe_len"],
            **options_of(mode, coupling),
        )
        tokens = layout.cu_seqlens[:-1, None] + grid[:, 1] * size[:, 1:] + grid[:, 0]  # their row 0 is the column
        for table, part in zip(tables, ("cos", "sin"), strict=True):
            expected = tensors[f"{key}.batch.{part}"]
            assert (repeated(table[tokens.flatten()]) - expected.flatten(0, 1)).abs().max() <= 1e-6, key


def test_magnitude_factors_are_those_of_the_published_code() -> None:
    about, _ = golden("fitv2_rope")
    for key, factors in about["scale_factors"].items():
        size = torch.tensor([list(map(int, key.rsplit(".", 1)[1].split("x")))])
        for name, expected in factors.items():
            factor = magnitude_factor(size, about["ori_max_pe_len"], name)
            assert factor.item() == pytest.approx(expected, rel=1e-6)


def test_reference_order_is_that_of_the_published_code() -> None:
    about, _ = golden("nit_rope_order")
    for case in about["cases"]:
        layout = PackLayout.from_grids([(case["h"], case["w"])])
        assert token_coordinates(layout, "reference").tolist() == case["reference_rope_h_w"]
        assert token_coordinates(layout, "row_major").tolist() == case["token_true_row_col"]


@settings(max_examples=50, deadline=None)
@given(grids)
def test_both_orders_give_every_position_of_an_image_once(sizes: list[tuple[int, int]]) -> None:
    layout = PackLayout.from_grids(sizes)
    for order in ("row_major", "reference"):
        coordinates = token_coordinates(layout, order).split(list(layout.lengths))
        for (rows, columns), of_image in zip(sizes, coordinates, strict=True):
            expected = {(row, column) for row in range(rows) for column in range(columns)}
            assert set(map(tuple, of_image.tolist())) == expected


@settings(max_examples=50, deadline=None)
@given(grids, st.sampled_from(EXTRAPOLATIONS), st.sampled_from(MAGNITUDES), st.booleans())
def test_an_image_has_the_same_table_alone_and_in_a_pack(
    sizes: list[tuple[int, int]], extrapolation: str, magnitude: str, decoupled: bool
) -> None:
    options = {"extrapolation": extrapolation, "magnitude": magnitude, "decoupled": decoupled, "train_grid": 4}
    layout = PackLayout.from_grids(sizes)
    cos, sin = rope_tables(layout, 16, **options)
    alone = [rope_tables(PackLayout.from_grids([size]), 16, **options) for size in sizes]
    assert torch.equal(cos, torch.cat([table for table, _ in alone]))
    assert torch.equal(sin, torch.cat([table for _, table in alone]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 9), st.integers(0, 9))
def test_attention_logits_depend_on_the_offset_alone(row: int, column: int, down: int, right: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, generator=generator, dtype=torch.float64)
    frequencies = base_frequencies(8, 100.0)

    def turned(x: torch.Tensor, at: tuple[int, int]) -> torch.Tensor:
        angles = (torch.tensor(at, dtype=torch.float64)[:, None] * frequencies).flatten()[None]
        return apply_rope(x, angles.cos(), angles.sin())

    here = (turned(q, (0, 0)) * turned(k, (down, right))).sum()
    there = (turned(q, (row, column)) * turned(k, (row + down, column + right))).sum()
    assert torch.allclose(here, there, atol=1e-9)


def test_extrapolation_leaves_images_within_the_training_grid_alone() -> None:
    sides = torch.tensor([[16, 16], [7, 16], [1, 1]])
    for extrapolation in ("linear", "ntk", "ntk-by-parts", "yarn"):
        frequencies = axis_frequencies(sides, 36, 10000.0, extrapolation, 16)
        assert torch.allclose(frequencies, base_frequencies(36, 10000.0).expand(3, 2, -1), rtol=1e-6)


def test_a_fixed_grid_sets_the_scale_of_all_images() -> None:
    layout = PackLayout.from_grids([(2, 3), (5, 4)])
    fixed, _ = rope_tables(layout, 16, extrapolation="linear", train_grid=4, test_grid=(8, 8), decoupled=False)
    plain, _ = rope_tables(layout, 16)
    assert not torch.equal(fixed, plain)
    halved = token_coordinates(layout)[..., None].float() * base_frequencies(8, 10000.0) / 2
    assert torch.allclose(fixed, halved.flatten(1).cos(), atol=1e-6)


def test_the_attention_scale_is_that_of_the_paper() -> None:
    size = torch.tensor([[16, 16], [20, 20], [32, 32], [64, 64]])
    logit_scale = magnitude_factor(size, 16, "attention_scale") ** 2
    expected = torch.log(torch.tensor([1.0, 400 / 256, 4, 16])).sqrt().clamp(min=1)
    assert torch.allclose(logit_scale, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fast_rotation_is_the_plain_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, 8, generator=generator).to(dtype)
    angles = torch.randn(7, 4, generator=generator)
    turned = apply_rope(x, angles.cos(), angles.sin())
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    assert torch.allclose(turned[..., ::2], even * cos - odd * sin)
    assert torch.allclose(turned[..., 1::2], odd * cos + even * sin)


def test_wrong_options_are_errors_that_name_them() -> None:
    layout = PackLayout.from_grids([(2, 2)])
    with pytest.raises(UserError, match="head_dim=6"):
        rope_tables(layout, 6)
    with pytest.raises(UserError, match="train_grid"):
        rope_tables(layout, 8, extrapolation="ntk")
    with pytest.raises(UserError, match="'ntk-aware'"):
        rope_tables(layout, 8, extrapolation="ntk-aware", train_grid=4)
    with pytest.raises(UserError, match="order='colum"):
        rope_tables(layout, 8, order="column_major")
