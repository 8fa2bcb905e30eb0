import hashlib
import io
import pickle
import tarfile

import google_crc32c
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale.data.index import index_shard
from nitscale.data.shards import LatentRef, ShardWriter, UnreadableSample, read_latent
from nitscale.data.storage import open_storage

GRIDS = [(1, 1), (3, 5), (16, 2)]


def sample(i, grid, channels=4):
    latents = np.random.default_rng(i).standard_normal((2, channels, *grid)).astype(np.float16)
    return f"class/{i:03d}", latents, {"class": "class", "source": f"class/{i:03d}.png"}


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, ShardWriter(file) as writer:
        for item in samples:
            writer.add(*item)


def refs(path):
    """References to every sample of a shard, by its index."""
    arrays, _ = index_shard(path, {"class": 0})
    columns = [arrays[name].tolist() for name in ("offset", "length", "rows", "columns", "crc32c")]
    return [LatentRef(f"shards/{path.name}", o, n, (r, c), crc) for o, n, r, c, crc in zip(*columns, strict=True)]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shards" / "000000.tar"
    write(path, [sample(i, grid) for i, grid in enumerate(GRIDS)])
    return path


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path)


@settings(max_examples=25, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), channels=st.integers(1, 8)
)
def test_latents_come_back_bit_for_bit(tmp_path_factory, grids, channels):
    folder = tmp_path_factory.mktemp("shard")
    path = folder / "shards" / "000000.tar"
    samples = [sample(i, grid, channels) for i, grid in enumerate(grids)]
    write(path, samples)
    for ref, (_, latents, _), grid in zip(refs(path), samples, grids, strict=True):
        assert ref.grid == grid
        for flipped in (False, True):
            read = read_latent(open_storage(folder), ref, channels, flipped)
            assert read.tobytes() == latents[int(flipped)].tobytes()


def test_any_webdataset_reader_can_read_a_shard(shard):
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert [item["__key__"] for item in read] == ["class/000", "class/001", "class/002"]
    assert read[1]["json"]["source"] == "class/001.png"
    np.testing.assert_array_equal(read[1]["latent.npy"], sample(1, GRIDS[1])[1])


def test_the_same_samples_give_the_same_bytes(shard, tmp_path):
    write(tmp_path / "again.tar", [sample(i, grid) for i, grid in enumerate(GRIDS)])
    assert (tmp_path / "again.tar").read_bytes() == shard.read_bytes()


def test_the_index_gives_keys_classes_checksums_and_the_hash_of_the_shard(shard):
    arrays, sha256 = index_shard(shard, {"class": 7})
    assert arrays["keys"].tolist() == [b"class/000", b"class/001", b"class/002"]
    assert arrays["label"].tolist() == [7, 7, 7]
    data = shard.read_bytes()
    payloads = [data[o : o + n] for o, n in zip(arrays["offset"], arrays["length"], strict=True)]
    assert [google_crc32c.value(payload) for payload in payloads] == arrays["crc32c"].tolist()
    assert sha256 == hashlib.sha256(data).hexdigest()


def test_a_flipped_bit_anywhere_in_a_latent_is_noticed(shard, storage):
    ref = refs(shard)[1]
    whole = shard.read_bytes()
    for position in range(ref.offset, ref.offset + ref.length, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        shard.write_bytes(damaged)
        with pytest.raises(UnreadableSample, match="checksum"):
            read_latent(storage, ref, 4, False)


def test_a_truncated_or_missing_shard_is_noticed(shard, storage):
    ref = refs(shard)[2]
    shard.write_bytes(shard.read_bytes()[: ref.offset + 10])
    with pytest.raises(UnreadableSample, match="truncated"):
        read_latent(storage, ref, 4, False)
    shard.unlink()
    with pytest.raises(UnreadableSample, match="No such file"):
        read_latent(open_storage(storage.prefix), ref, 4, False)


def npy(array, version=(1, 0)):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a shard ran code",))


@pytest.mark.parametrize(
    "payload",
    [
        pickle.dumps(Bomb()),
        npy(np.array([Bomb()], dtype=object)),
        npy(np.zeros((2, 4, 3, 5), np.float32)),
        npy(np.zeros((2, 4, 3, 5), ">f2")),
        npy(np.zeros((2, 4, 5, 3), np.float16).swapaxes(2, 3)[:, ::-1].copy(order="F")),
        npy(np.zeros((2, 4, 3, 5), np.float16))[:-1],
        npy(np.zeros((2, 4, 3, 5), np.float16)) + b"x",
        npy(np.zeros((2, 4, 3, 5), np.float16), version=(2, 0)),
        npy(np.zeros((2, 4, 3, 6), np.float16)),
        npy(np.zeros((1, 4, 3, 5), np.float16)),
        npy(np.zeros((2, 4, 3, 5), np.float16)).replace(b"(2, 4, 3, 5)", b"(2, 4, 3,-5)"),
        npy(np.zeros((2, 4, 3, 5), np.float16)).replace(b"'shape'", b"'shapo'"),
        b"",
        b"\x93NUMPY\x01\x00\xff\xff",
    ],
)
def test_a_payload_that_is_not_the_promised_array_is_refused_and_never_unpickled(tmp_path, payload):
    (tmp_path / "shard").write_bytes(payload + b"padding")
    ref = LatentRef("shard", 0, len(payload), (3, 5), google_crc32c.value(payload))
    with pytest.raises(UnreadableSample):
        read_latent(open_storage(tmp_path), ref, 4, False)


def test_indexing_refuses_a_member_that_is_no_latent(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("key.latent.npy")
        payload = pickle.dumps(Bomb())
        member.size = len(payload)
        tar.addfile(member, io.BytesIO(payload))
    with pytest.raises(ValueError, match=r"key\.latent\.npy: the payload is not"):
        index_shard(tmp_path / "a.tar", {})


@pytest.mark.parametrize("key", ["", "class/a.b", "a.latent"])
def test_keys_that_webdataset_would_cut_are_refused(key):
    with pytest.raises(ValueError, match="has no dot"):
        ShardWriter(io.BytesIO()).add(key, sample(0, (1, 1))[1], {})


@pytest.mark.parametrize("latents", [np.zeros((2, 4, 1, 1), np.float32), np.zeros((3, 4, 1, 1), np.float16)])
def test_latents_of_another_dtype_or_shape_are_refused(latents):
    with pytest.raises(ValueError, match="expected float16"):
        ShardWriter(io.BytesIO()).add("key", latents, {})
