import hashlib
import io
import json
import shutil

import numpy as np
import pytest

from nitscale.data.manifest import load_dataset
from nitscale.data.verify import verify_dataset
from nitscale.errors import UserError
from tests.data.damage import damage
from tests.data.faults import s3_behind_faults


@pytest.fixture
def folder(shapes_dataset, tmp_path):
    return shutil.copytree(shapes_dataset, tmp_path / "set")


def verify(folder):
    return verify_dataset(folder, workers=2, progress=False)


def rewrite_index(folder, **changes):
    """Another first index, which the manifest vouches for."""
    path = min((folder / "index").iterdir())
    with np.load(path) as file:
        arrays = {name: change(file[name]) if (change := changes.get(name)) else file[name] for name in file}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue())
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(s for s in manifest["shards"] if s["index"].endswith(path.name))
    entry["index_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_dataset_is_whole_and_strangers_are_named(folder):
    assert "is whole: 64 samples, 4 shards" in verify(folder)
    (folder / "shards" / "old.tar").write_bytes(b"x")
    assert "1 objects that the manifest does not name, such as shards/old.tar" in verify(folder)


def test_a_flipped_bit_is_found_in_shard_and_index(folder):
    dataset = load_dataset(folder)
    damage(folder, dataset, 5)
    with pytest.raises(UserError) as error:
        verify(folder)
    shard = dataset.index.ref(5).shard
    assert f"{shard}: its sha256 differs" in str(error.value)
    assert f"crc32c of 1 samples is not that of the shard, such as {dataset.index.key(5)!r}" in str(error.value)
    assert "run the same encode again" in str(error.value)


@pytest.mark.parametrize("column", ["offset", "rows", "crc32c", "keys"])
def test_an_index_that_lies_with_the_right_hash_is_found(folder, column):
    changes = {
        "offset": lambda a: a + 512,
        "rows": lambda a: a[::-1],
        "crc32c": lambda a: a ^ 1,
        "keys": lambda a: a[::-1],
    }
    rewrite_index(folder, **{column: changes[column]})
    with pytest.raises(UserError, match=rf"{column} of \d+ samples is not that of the shard"):
        verify(folder)


def test_a_missing_a_short_and_a_foreign_shard_are_named(folder):
    first, second, third, _ = sorted((folder / "shards").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    third.write_bytes(bytes(third.stat().st_size))
    with pytest.raises(UserError) as error:
        verify(folder)
    text = str(error.value)
    assert f"shards/{first.name} or its index cannot be read" in text
    assert f"shards/{second.name} has " in text
    assert f"{third.name}: no latent" in text


def test_a_dataset_in_an_object_store_is_verified(folder):
    with s3_behind_faults() as proxy:
        from nitscale.data.storage import open_storage

        store = open_storage("s3://bucket/set")
        for path in folder.rglob("*.*"):
            if path.is_file() and not path.name.startswith("."):
                store.write(path.relative_to(folder).as_posix(), path.read_bytes())
        proxy.add(2, status=503)
        proxy.add(containing="shards", cut_body=3000)
        assert "is whole" in verify("s3://bucket/set")
        damage(folder, load_dataset(folder), 5)
        for path in (folder / "shards").iterdir():
            store.write(f"shards/{path.name}", path.read_bytes())
        with pytest.raises(UserError, match="its sha256 differs"):
            verify("s3://bucket/set")
