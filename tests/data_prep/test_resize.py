import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.resize import Target, apply, native_size, parse_rule
from nitscale.errors import UserError
from tests.data_prep.pictures import picture

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "native_resize.json").read_text())


def at_least(side, multiple):
    return max(side, multiple)  # the published code fails on a side of zero


def test_sizes_are_those_of_the_published_code():
    for width, height, new_width, new_height in GOLDEN["rows"]:
        expected = (at_least(new_height, 32), at_least(new_width, 32))
        assert native_size(height, width, 32, 2048) == expected, (height, width)


def test_sizes_are_those_of_the_published_code_at_other_limits():
    for width, height, multiple, largest, new_width, new_height in GOLDEN["other_limits"]:
        expected = (at_least(new_height, multiple), at_least(new_width, multiple))
        assert native_size(height, width, multiple, largest) == expected, (height, width, multiple, largest)


@given(
    height=st.integers(1, 30000),
    width=st.integers(1, 30000),
    multiple=st.sampled_from([8, 16, 32, 64]),
    tokens=st.integers(1, 5000),
)
def test_sides_are_multiples_and_the_area_is_capped_except_for_slivers(height, width, multiple, tokens):
    new_height, new_width = native_size(height, width, multiple, multiple * tokens**0.5)
    assert new_height % multiple == new_width % multiple == 0
    assert min(new_height, new_width) >= multiple
    if min(new_height, new_width) > multiple:
        assert new_height * new_width <= tokens * multiple**2


def adm_center_crop(image, side):
    """ADM's centre crop, written out with Pillow and NumPy."""
    while min(image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), side=st.sampled_from([16, 32, 48]))
def test_squares_are_those_of_adm(height, width, side):
    image = picture(height, width)
    target = parse_rule(f"square-{side}").target(height, width, 16, 1, "key")
    assert target.final == (side, side)
    np.testing.assert_array_equal(np.asarray(apply(image, target)), adm_center_crop(image, side))


@given(height=st.integers(1, 30000), width=st.integers(1, 30000), side=st.sampled_from([16, 64, 256, 512]))
def test_squares_of_any_size_are_scaled_by_adms_arithmetic(height, width, side):
    target = parse_rule(f"square-{side}").target(height, width, 16, 1, "key")
    sizes = [(width, height)]
    while min(sizes[-1]) >= 2 * side:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    scale = side / min(sizes[-1])
    assert target.halvings == len(sizes) - 1
    assert target.size == (round(sizes[-1][1] * scale), round(sizes[-1][0] * scale))
    assert min(target.size) == side


def fit_resize(w, h, image_size, min_len):
    """FiT's size, written out; its sides may be zero."""
    if w * h >= image_size**2:
        new_w = np.sqrt(w / h) * image_size
        new_h = new_w * h / w
    elif w < min_len:
        new_w, new_h = min_len, min_len * h / w
    elif h < min_len:
        new_w, new_h = min_len * w / h, min_len
    else:
        new_w, new_h = w, h
    return int(new_h / min_len) * min_len, int(new_w / min_len) * min_len


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), side=st.sampled_from([256, 512]))
def test_area_is_that_of_fit_with_a_smallest_side_and_within_its_area(height, width, side):
    published = tuple(at_least(length, 16) for length in fit_resize(width, height, side, 16))
    found = parse_rule(f"area-{side}").target(height, width, 16, 1, "key").final
    assert found[0] % 16 == found[1] % 16 == 0
    assert found[0] * found[1] <= side**2
    if published[0] * published[1] <= side**2:
        assert found == published
    else:
        assert min(found) == min(published) == 16 and max(found) == side**2 // 16


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((375, 500), (208, 288)),
        ((8, 100), (16, 192)),
        ((100, 8), (192, 16)),
        ((4000, 15), (4096, 16)),
        ((1, 1), (16, 16)),
    ],
)
def test_area_scales_thin_images_up_and_large_ones_down(size, expected):
    assert parse_rule("area-256").target(*size, 16, 1, "key").final == expected


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), key=st.text(max_size=5))
def test_mixed_is_the_crop_or_the_area_rule(height, width, key):
    mixed, square, area = (
        parse_rule(f"{rule}-256").target(height, width, 16, 1, key) for rule in ("mixed", "square", "area")
    )
    assert mixed in ((square, area) if min(height, width) > 256 else (area,))


def test_mixed_crops_half_of_the_images_that_are_large_enough_and_always_the_same_ones():
    rule = parse_rule("mixed-256")
    crops = [rule.target(375, 500, 16, 1, f"image-{i}") for i in range(1000)]
    assert 400 < sum(target.crop is not None for target in crops) < 600
    assert crops == [rule.target(375, 500, 16, 1, f"image-{i}") for i in range(1000)]
    assert {target.final for target in crops} == {(256, 256), (208, 288)}
    assert all(rule.target(256, 900, 16, 1, f"image-{i}").crop is None for i in range(50))


def test_native_alone_is_capped_by_tokens():
    assert parse_rule("native").target(375, 500, 32, 4096, "key").final == (352, 480)
    assert parse_rule("native").target(375, 500, 32, 64, "key").final == (192, 288)


@pytest.mark.parametrize("name", ["", "square", "square-0", "square-x", "area-", "cube-256", "native-256"])
def test_an_unknown_rule_is_refused(name):
    with pytest.raises(UserError, match="unknown resize rule"):
        parse_rule(name)


def test_a_side_that_the_codec_cannot_make_is_refused_with_the_nearest_one():
    for side, nearest in ((250, 256), (271, 256), (1, 32)):
        with pytest.raises(UserError, match=rf"{side} is not a multiple of 32 pixels .*use square-{nearest}"):
            parse_rule(f"square-{side}").target(500, 500, 32, 1, "key")


def test_an_image_of_the_right_size_is_left_alone():
    image = picture(32, 64)
    assert apply(image, Target((32, 64))) is image
