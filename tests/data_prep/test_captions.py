import builtins
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.captions import Captions, read_captions
from nitscale.errors import UserError


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(st.lists(st.tuples(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), st.text(max_size=5))))
def test_captions_are_those_of_a_dictionary(rows):
    captions, expected = Captions(iter(rows)), dict(rows)
    for image_id in {*expected, 0, -(2**63), 2**63 - 1}:
        assert captions.get(image_id) == expected.get(image_id)


def test_lines_and_tables_give_the_same_captions(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image_id": i, "caption": text} for i, text in ((5, "fünf"), (0, ""), (7, None), (10**9, "many\nlines"))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "captions.parquet", row_group_size=2)
    for path in (write_lines(tmp_path / "captions.jsonl", *rows), tmp_path / "captions.parquet"):
        captions = read_captions(path)
        assert [captions.get(i) for i in (5, 0, 7, 10**9, 6)] == ["fünf", "", None, "many\nlines", None]


def test_columns_may_be_called_id_and_text(tmp_path):
    captions = read_captions(write_lines(tmp_path / "a.jsonl", {"id": "3", "text": "three", "more": [1]}))
    assert captions.get(3) == "three"


def test_text_that_is_no_unicode_is_replaced(tmp_path):
    assert read_captions(write_lines(tmp_path / "a.jsonl", {"id": 3, "text": "\ud800"})).get(3) == "?"


@pytest.mark.parametrize(
    "line",
    ["{}", "[1]", "1", '{"image_id": "x", "caption": "y"}', '{"id": 1, "text": 2}', f'{{"id": {2**64}, "text": ""}}'],
)
def test_a_row_that_is_no_caption_is_named(tmp_path, line):
    (tmp_path / "captions.jsonl").write_text('{"id": 1, "text": "good"}\n\n' + line)
    with pytest.raises(
        UserError, match=r"captions: row 2 of .*captions\.jsonl has no image_id and caption .*give JSONL"
    ):
        read_captions(tmp_path / "captions.jsonl")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 10**5])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"captions: .*{name} cannot be read"):
        read_captions(tmp_path / name)


def test_files_that_are_not_there_or_elsewhere_are_named(tmp_path):
    with pytest.raises(UserError, match=r"captions: .*none\.jsonl cannot be read"):
        read_captions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is no local file"):
        read_captions("s3://bucket/captions.jsonl")


def test_parquet_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_pyarrow(name, *arguments):
        if name.startswith("pyarrow"):
            raise ImportError("No module named 'pyarrow'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(UserError, match=r"pip install 'nitscale\[parquet\]'"):
        read_captions(tmp_path / "captions.parquet")
