import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import save

from nitscale.data import foreign
from nitscale.data.foreign import index_dataset, read_classes, read_codec
from nitscale.data.loader import PackLoader
from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Plan, PlanConfig
from nitscale.data.verify import verify_dataset
from nitscale.errors import UserError

CODEC = {"id": "external", "factor": 8, "channels": 4, "digest": ""}


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def latent(i, shape=(4, 2, 3), dtype=np.float32):
    return np.random.default_rng(i).standard_normal(shape).astype(dtype)


def write_tar(path, samples):
    """A tar of samples, each a mapping from suffix to contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for suffix, contents in sample.items():
                info = tarfile.TarInfo(f"{path.stem}{i}.{suffix}")
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))


def index(folder, *arguments, codec=CODEC, **options):
    return index_dataset(folder, codec, *arguments, workers=2, progress=False, **options)


@pytest.mark.parametrize(
    ("suffix", "pack", "dtype"),
    [
        ("npy", lambda x: npy(x.numpy()), torch.float32),
        ("vae.npy", lambda x: npy(x.numpy()), torch.float16),
        ("latent.safetensors", lambda x: save({"latent": x}), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("variants", [(), (1,), (2,)])
def test_tars_of_any_names_become_a_dataset_that_loads_and_verifies(tmp_path, suffix, pack, dtype, variants):
    made = [torch.from_numpy(latent(i, (*variants, 4, 2 + i % 2, 3))).to(dtype) for i in range(6)]
    for name, numbers in (("a/part", range(3)), ("b/part", range(3, 6))):
        write_tar(tmp_path / f"{name}.tar", [{suffix: pack(made[i]), "cls": str(i).encode()} for i in numbers])
    assert "6 samples" in index(tmp_path)
    dataset = load_dataset(tmp_path)
    assert dataset.manifest.flips == (variants == (2,))
    assert dataset.manifest.classes == list("012345")
    assert dataset.index.label.tolist() == list(range(6))
    for i, expected in enumerate(made):
        assert torch.equal(dataset.latent(i), expected[0] if variants else expected)
    plan = Plan(dataset, PlanConfig(0, 16, 1, flip_probability=0.0))
    batch = next(iter(PackLoader(dataset, plan, plan.start())))
    assert batch.tokens.dtype == dtype and batch.weights.all()
    assert "is whole" in verify_dataset(tmp_path, progress=False)
    with pytest.raises(UserError, match="made with 'external'"):
        dataset.codec()


def test_labels_come_from_json_or_by_name(tmp_path):
    samples = [
        {"npy": npy(latent(0)), "json": b'{"label": 2}'},
        {"npy": npy(latent(1)), "json": b'{"class": "dog"}', "txt": b"text", "jpg": b"jpg"},
        {"npy": npy(latent(2)), "cls": b"cat"},
    ]
    write_tar(tmp_path / "a.tar", samples)
    (tmp_path / "names").write_text("cat\ndog\nwolf\n")
    index(tmp_path, read_classes(tmp_path / "names"))
    dataset = load_dataset(tmp_path)
    assert dataset.index.label.tolist() == [2, 1, 0]
    assert dataset.manifest.classes == ["cat", "dog", "wolf"]
    assert dataset.manifest.members == []
    with pytest.raises(UserError, match=r"a\.tar: a1: .*class 'dog' is no number, and not in the list"):
        index_other = tmp_path / "other"
        write_tar(index_other / "a.tar", samples)
        index(index_other)


def test_members_that_every_sample_has_are_in_the_index(tmp_path):
    write_tar(tmp_path / "a.tar", [{"npy": npy(latent(i)), "txt": f"text {i}".encode()} for i in range(3)])
    index(tmp_path)
    dataset = load_dataset(tmp_path)
    assert dataset.manifest.members == ["text"]
    start, length = (int(dataset.index.extra[f"text_{name}"][2]) for name in ("offset", "length"))
    assert dataset.storage.read_range("a.tar", start, length) == b"text 2"


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 6, 5), np.float32, r"a0\.features\.npy: .*float16 \(v, tokens, Z\), not float32"),
        ((6, 5), np.float16, r"not float16 \[6, 5\]"),
        ((1, 6, 5), np.float16, "a0: .*do not have the same variants"),
    ],
)
def test_features_of_another_kind_are_refused(tmp_path, shape, dtype, reason):
    sample = {"npy": npy(latent(0, (2, 4, 2, 3))), "features.npy": npy(np.zeros(shape, dtype)), "cls": b"0"}
    write_tar(tmp_path / "a.tar", [sample])
    with pytest.raises(UserError, match=reason):
        index(tmp_path)


def test_a_second_run_reads_only_what_is_new(tmp_path, monkeypatch):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [{"npy": npy(latent(0)), "cls": b"1"}])
    index(tmp_path)
    (tmp_path / "manifest.json").unlink()
    write_tar(tmp_path / "b.tar", [{"npy": npy(latent(i)), "cls": b"1"} for i in range(9)])
    read, index_tar = [], foreign.index_tar
    monkeypatch.setattr(foreign, "index_tar", lambda path, *rest: read.append(path.name) or index_tar(path, *rest))
    assert "10 samples" in index(tmp_path)
    assert read == ["b.tar"]


@pytest.mark.parametrize("suffix", ["pth", "pt", "pkl"])
def test_pickles_are_refused_and_never_opened(tmp_path, suffix):
    write_tar(tmp_path / "a.tar", [{suffix: pickle.dumps(latent(0)), "cls": b"1"}])
    with pytest.raises(UserError, match=r"are pickles .* could run code"):
        index(tmp_path)
    with pytest.raises(UserError, match="is a pickle, which could run code"):
        index(tmp_path, latent=f"latent.{suffix}")


def test_two_kinds_of_arrays_must_be_told_apart(tmp_path):
    write_tar(tmp_path / "a.tar", [{"latent.npy": npy(latent(0)), "clip.npy": npy(np.zeros(7)), "cls": b"1"}])
    with pytest.raises(UserError, match=r"which members .* --latent"):
        index(tmp_path)
    assert "1 samples" in index(tmp_path, latent="latent.npy")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"npy": npy(latent(0, (5, 2, 3)))}, "the latents have 5 channels, the codec 4"),
        ({"npy": npy(latent(0, (4,)))}, "a latent is"),
        ({"npy": npy(latent(0, dtype=np.float64))}, "latents are float16"),
        ({"npy": b"nonsense"}, "a0.npy"),
        ({"npy": npy(latent(0)), "json": b"{"}, "a0"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, contents, message):
    write_tar(tmp_path / "a.tar", [contents])
    with pytest.raises(UserError, match=message):
        index(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_latents_of_two_kinds_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [{"npy": npy(latent(0))}, {"npy": npy(latent(1, dtype=np.float16))}])
    with pytest.raises(UserError, match=r"a1\.npy: .*but the samples before are"):
        index(tmp_path)
    write_tar(tmp_path / "a.tar", [{"npy": npy(latent(0))}])
    write_tar(tmp_path / "b.tar", [{"npy": npy(latent(1, dtype=np.float16))}])
    with pytest.raises(UserError, match=r"different latents: a\.tar has .*; b\.tar has"):
        index(tmp_path)


def test_a_codec_is_described_by_a_file_or_by_two_numbers(tmp_path):
    (tmp_path / "codec.json").write_text(json.dumps(CODEC))
    assert read_codec(tmp_path / "codec.json", None, None) == CODEC
    assert read_codec(None, 8, 4) == CODEC
    with pytest.raises(UserError, match=r"give --codec FILE\.json, or --factor"):
        read_codec(None, 8, None)
    (tmp_path / "codec.json").write_text("{}")
    with pytest.raises(UserError, match="no description of a codec"):
        read_codec(tmp_path / "codec.json", None, None)
