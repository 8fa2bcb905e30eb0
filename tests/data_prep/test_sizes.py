from collections import Counter

import numpy as np
import pytest

from data_prep.sizes import apportion, sizes_dataset
from nitscale.errors import UserError


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "sizes.csv"
    path.write_text("width,height,count\n500,375,3\n375,500,1\n64,4096,1\n")
    return path


def test_sizes_become_the_grids_that_encoding_would_give(table):
    dataset = sizes_dataset(table, 5000)
    found = Counter(zip(dataset.index.rows.tolist(), dataset.index.columns.tolist(), strict=True))
    assert found == {(11, 15): 3000, (15, 11): 1000, (128, 2): 1000}
    assert dataset.index.num_samples == dataset.manifest.samples == 5000
    assert len(dataset.index.shards) == 3
    assert dataset.manifest.tokens == 165 * 4000 + 256 * 1000
    assert len(set(dataset.index.rows[:100].tolist())) == 3  # shuffled


def test_without_a_number_every_image_of_the_table_counts_once(table):
    assert sizes_dataset(table).index.num_samples == 5


def test_counts_are_scaled_to_exactly_the_total():
    assert apportion(np.array([1, 1, 1]), 10).tolist() == [4, 3, 3]
    assert apportion(np.array([5, 0, 3]), 8).tolist() == [5, 0, 3]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        "width,height,count\n",
        "width,height,count\n0,5,1\n",
        "width,height,count\nx,5,1\n",
        "width,height,count\n5,5,-1\n",
        "width,height,count\n5,5\n",
    ],
)
def test_what_is_no_table_of_sizes_is_refused_with_an_example(tmp_path, text):
    (tmp_path / "sizes.csv").write_text(text)
    with pytest.raises(UserError, match=r"sizes\.csv .*give a CSV file with a line `width,height,count`"):
        sizes_dataset(tmp_path / "sizes.csv")


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.csv"):
        sizes_dataset(tmp_path / "none.csv")
