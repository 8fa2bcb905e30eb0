import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.resize import native_size, resize
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


@pytest.mark.parametrize("size", [(32, 64), (16, 16), (96, 32)])
def test_resizing_gives_height_and_width_in_this_order(size):
    assert resize(picture(50, 70), size).size == size[::-1]


def test_an_image_of_the_right_size_is_left_alone():
    image = picture(32, 64)
    assert resize(image, (32, 64)) is image
