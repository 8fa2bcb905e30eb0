import hashlib
import io
import json
import shutil
import zipfile

import numpy as np
import pytest

from nitscale.data.manifest import load_dataset
from nitscale.errors import UserError


@pytest.fixture
def folder(shapes_dataset, tmp_path):
    """A copy of a good dataset, to be damaged."""
    return shutil.copytree(shapes_dataset, tmp_path / "set")


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def objects(folder, kind):
    """Paths of the shards ("tar") or index files, in the manifest's order."""
    return [folder / shard[kind] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]


def edit_index(folder, **changes):
    """Rewrite the first shard's index and make the manifest agree with its hash."""
    path = objects(folder, "index")[0]
    with np.load(path) as file:
        arrays = dict(file) | changes
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    replace_index(folder, buffer.getvalue())


def replace_index(folder, data):
    objects(folder, "index")[0].write_bytes(data)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["index_sha256"] = hashlib.sha256(data).hexdigest()
    edit(folder, shards=shards)


def test_a_dataset_opens_with_all_samples_in_the_order_of_its_shards(folder):
    dataset = load_dataset(folder)
    manifest, index = dataset.manifest, dataset.index
    assert index.num_samples == manifest.samples == sum(manifest.grids.values()) == 64
    assert manifest.tokens == int((index.rows * index.columns).sum())
    assert len(manifest.classes) == 8
    assert np.bincount(index.label, minlength=8).tolist() == [8] * 8
    keys = [index.key(i) for i in range(64)]
    assert len(set(keys)) == 64
    for key, label in zip(keys, index.label, strict=True):
        assert key.split("/")[0] == manifest.classes[label].replace(" ", "_")
    assert dataset.codec().spec() == manifest.codec


def test_the_digest_covers_every_field(folder):
    before = load_dataset(folder).manifest.digest
    assert load_dataset(folder).manifest.digest == before
    classes = json.loads((folder / "manifest.json").read_text())["classes"]
    edit(folder, classes=[*classes[:-1], "renamed"])
    assert load_dataset(folder).manifest.digest != before


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"no dataset at .*nowhere.*nitscale encode"):
        load_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema_version": 2}', '{"schema_version": 2, "x": 2}', "\xff"]
)
def test_a_damaged_manifest_is_named(folder, text):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_dataset(folder)


@pytest.mark.parametrize(
    "changes",
    [{"samples": 63}, {"shards": []}, {"flips": "yes"}, {"codec": {}}, {"classes": None}, {"members": ["code"]}],
)
def test_a_manifest_with_impossible_values_is_refused(folder, changes):
    edit(folder, **changes)
    with pytest.raises(UserError, match="is damaged"):
        load_dataset(folder)


def test_a_manifest_of_another_version_is_refused(folder):
    edit(folder, schema_version=99)
    with pytest.raises(UserError, match="schema_version 99, this build reads 2"):
        load_dataset(folder)


def test_latents_of_another_dtype_are_refused(folder):
    edit(folder, dtype="int8")
    with pytest.raises(UserError, match="dtype 'int8'"):
        load_dataset(folder)


def test_a_missing_or_shortened_shard_is_named(folder):
    shard = objects(folder, "tar")[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{shard.name} of dataset .* bytes instead of"):
        load_dataset(folder)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} of dataset .* is missing"):
        load_dataset(folder)


def test_a_missing_or_changed_index_is_named(folder):
    index = objects(folder, "index")[1]
    damaged = bytearray(index.read_bytes())
    damaged[200] ^= 1
    index.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{index.name} differs from its hash"):
        load_dataset(folder)
    index.unlink()
    with pytest.raises(UserError, match=rf"cannot read index/{index.name}"):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": np.full(16, 2**60)}, "points behind the end"),
        (
            {"rows": np.full(16, 2**31 - 1, np.int32), "columns": np.full(16, 2**31 - 1, np.int32)},
            "points behind the end",
        ),
        ({"offset": np.full(16, -1)}, "negative offset"),
        ({"rows": np.zeros(16, np.int32)}, "empty grid"),
        ({"label": np.full(16, 8, np.int32)}, r"class outside 0\.\.7"),
        ({"label": np.full(16, -1, np.int32)}, r"class outside 0\.\.7"),
        ({"rendition": np.full(16, 1, np.uint8)}, r"rendition outside 0\.\.0"),
        ({"crc32c": np.zeros((15, 2), np.uint32)}, "16 entries"),
        ({"crc32c": np.zeros((16, 1), np.uint32)}, "16 entries"),
        ({"offset": np.zeros(16, np.float64)}, "16 entries of the known types"),
        ({"offset": np.array([{}] * 16, dtype=object)}, "is damaged"),
    ],
)
def test_a_lying_index_is_refused(folder, changes, message):
    edit_index(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_dataset(folder)


def zip_of(name, payload, compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr(name, payload)
    return buffer.getvalue()


def header_of(shape):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        zip_of("offset.npy", header_of((2**30,)) + bytes(2**33 // 1024), zipfile.ZIP_DEFLATED),
        zip_of("offset.npy", header_of((2**40,)), zipfile.ZIP_STORED),
        zip_of("offset.npy", header_of((16,)), zipfile.ZIP_STORED),
        b"no zip file",
    ],
)
def test_an_index_that_would_take_more_memory_than_it_has_bytes_is_refused(folder, data):
    replace_index(folder, data)
    with pytest.raises(UserError, match=r"index/.*\.npz is damaged"):
        load_dataset(folder)
