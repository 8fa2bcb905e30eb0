import io
import pickle
import tarfile

import google_crc32c
import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale.data.index import index_shard
from nitscale.data.shards import LATENT_DTYPES, LatentRef, ShardWriter, UnreadableSample, read_latent
from nitscale.data.storage import open_storage

GRIDS = [(1, 1), (3, 5), (16, 2)]


def sample(i, grid, channels=4, dtype=torch.float16, variants=2):
    numbers = np.random.default_rng(i).standard_normal((variants, channels, *grid)).astype(np.float32)
    metadata = {"label": 7, "rendition": "native", "source": f"class/{i:03d}.png"}
    return f"class/{i:03d}", torch.from_numpy(numbers).to(dtype), metadata


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, ShardWriter(file) as writer:
        for item in samples:
            writer.add(*item)


def refs(path):
    """References to every sample of a shard, by its index."""
    arrays = index_shard(path, ["native"])
    columns = [arrays[name].tolist() for name in ("offset", "rows", "columns", "crc32c")]
    return [LatentRef(f"shards/{path.name}", o, (r, c), tuple(crc)) for o, r, c, crc in zip(*columns, strict=True)]


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
    grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    channels=st.integers(1, 8),
    dtype=st.sampled_from(list(LATENT_DTYPES)),
    variants=st.integers(1, 2),
)
def test_latents_come_back_bit_for_bit(tmp_path_factory, grids, channels, dtype, variants):
    folder = tmp_path_factory.mktemp("shard")
    path = folder / "shards" / "000000.tar"
    samples = [sample(i, grid, channels, LATENT_DTYPES[dtype], variants) for i, grid in enumerate(grids)]
    write(path, samples)
    for ref, (_, latents, _), grid in zip(refs(path), samples, grids, strict=True):
        assert ref.grid == grid
        for flipped in range(variants):
            assert torch.equal(read_latent(open_storage(folder), ref, channels, dtype, flipped), latents[flipped])


def test_any_webdataset_reader_can_read_a_shard(shard):
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert [item["__key__"] for item in read] == ["class/000", "class/001", "class/002"]
    assert read[1]["json"]["source"] == "class/001.png"
    np.testing.assert_array_equal(read[1]["latent.npy"], sample(1, GRIDS[1])[1].numpy())


def test_bfloat16_latents_are_safetensors(tmp_path):
    latents = sample(0, (3, 5), dtype=torch.bfloat16)
    write(tmp_path / "a.tar", [latents])
    (read,) = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert torch.equal(safetensors.torch.load(read["latent.safetensors"])["latent"], latents[1])


def test_the_same_samples_give_the_same_bytes(shard, tmp_path):
    write(tmp_path / "again.tar", [sample(i, grid) for i, grid in enumerate(GRIDS)])
    assert (tmp_path / "again.tar").read_bytes() == shard.read_bytes()


def test_the_index_gives_keys_classes_renditions_and_where_everything_lies(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file, ShardWriter(file) as writer:
        for i, grid in enumerate(GRIDS):
            key, latents, metadata = sample(i, grid)
            writer.add(key, latents, metadata | {"rendition": f"square-{i}"}, image=bytes([i]) * 9, text=f"ä{i}")
    arrays = index_shard(path, ["square-2", "square-1", "square-0"])
    assert arrays["keys"].tolist() == [b"class/000", b"class/001", b"class/002"]
    assert arrays["label"].tolist() == [7, 7, 7]
    assert arrays["rendition"].tolist() == [2, 1, 0]
    data = path.read_bytes()
    for i, (key, latents, _) in enumerate(sample(i, grid) for i, grid in enumerate(GRIDS)):
        start, size = int(arrays["offset"][i]), latents.nbytes // 2
        for variant in range(2):
            payload = data[start + variant * size :][:size]
            assert payload == latents[variant].numpy().tobytes(), key
            assert google_crc32c.value(payload) == arrays["crc32c"][i, variant]
        for member, expected in (("image", bytes([i]) * 9), ("text", f"ä{i}".encode())):
            payload = data[arrays[f"{member}_offset"][i] :][: arrays[f"{member}_length"][i]]
            assert payload == expected
            assert google_crc32c.value(payload) == arrays[f"{member}_crc32c"][i]


def test_a_flipped_bit_anywhere_in_a_latent_is_noticed(shard, storage):
    ref = refs(shard)[1]
    whole = shard.read_bytes()
    size = 4 * 15 * 2
    for position in range(ref.offset, ref.offset + 2 * size, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        shard.write_bytes(damaged)
        in_mirror_image = position >= ref.offset + size
        with pytest.raises(UnreadableSample, match="checksum"):
            read_latent(storage, ref, 4, flipped=in_mirror_image)
        read_latent(storage, ref, 4, flipped=not in_mirror_image)


def test_a_truncated_or_missing_shard_is_noticed(shard, storage):
    ref = refs(shard)[2]
    shard.write_bytes(shard.read_bytes()[: ref.offset + 10])
    with pytest.raises(UnreadableSample, match="truncated"):
        read_latent(storage, ref, 4)
    shard.unlink()
    with pytest.raises(UnreadableSample, match="No such file"):
        read_latent(open_storage(storage.prefix), ref, 4)


def npy(array, version=(1, 0)):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a shard ran code",))


WHOLE = npy(np.zeros((2, 4, 3, 5), np.float16))
SAFE = safetensors.torch.save({"latent": torch.zeros(2, 4, 3, 5)})


@pytest.mark.parametrize(
    ("suffix", "payload"),
    [
        ("npy", pickle.dumps(Bomb())),
        ("npy", npy(np.array([Bomb()], dtype=object))),
        ("npy", npy(np.zeros((2, 4, 3, 5), np.float64))),
        ("npy", npy(np.zeros((2, 4, 3, 5), ">f2"))),
        ("npy", npy(np.zeros((2, 4, 5, 3), np.float16).swapaxes(2, 3)[:, ::-1].copy(order="F"))),
        ("npy", WHOLE[:-1]),
        ("npy", WHOLE + b"x"),
        ("npy", npy(np.zeros((2, 4, 3, 5), np.float16), version=(2, 0))),
        ("npy", WHOLE.replace(b"(2, 4, 3, 5)", b"(2, 4, 3,-5)")),
        ("npy", WHOLE.replace(b"'shape'", b"'shapo'")),
        ("npy", b""),
        ("npy", b"\x93NUMPY\x01\x00\xff\xff"),
        ("safetensors", pickle.dumps(Bomb())),
        ("safetensors", SAFE[:-1]),
        ("safetensors", SAFE + b"x"),
        ("safetensors", SAFE.replace(b"latent", b"patent")),
        ("safetensors", SAFE.replace(b"F32", b"I32")),
        ("safetensors", safetensors.torch.save({"latent": torch.zeros(1), "other": torch.zeros(1)})),
        ("safetensors", (2**40).to_bytes(8, "little") + b"{"),
        ("safetensors", b""),
    ],
)
def test_a_member_that_is_no_plain_array_is_refused_and_never_unpickled(tmp_path, suffix, payload):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo(f"key.latent.{suffix}")
        member.size = len(payload)
        tar.addfile(member, io.BytesIO(payload))
    with pytest.raises(ValueError, match=rf"key\.latent\.{suffix}: .*the payload"):
        index_shard(tmp_path / "a.tar", ["native"])


@pytest.mark.parametrize("key", ["", "class/a.b", "a.latent"])
def test_keys_that_webdataset_would_cut_are_refused(key):
    with pytest.raises(ValueError, match="has no dot"):
        ShardWriter(io.BytesIO()).add(key, sample(0, (1, 1))[1], {})


@pytest.mark.parametrize("latents", [torch.zeros(2, 4, 1, 1).double(), torch.zeros(3, 4, 1, 1).half()])
def test_latents_of_another_dtype_or_shape_are_refused(latents):
    with pytest.raises(ValueError, match=r"expected \(1 or 2, c, h, w\) latents"):
        ShardWriter(io.BytesIO()).add("key", latents, {})
