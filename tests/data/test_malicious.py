"""A malicious data set cannot run code, reach outside its prefix, or take unbounded memory."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from nitscale.data.foreign import index_dataset
from nitscale.data.loader import PackLoader
from nitscale.data.manifest import load_dataset
from nitscale.data.overview import inspect_dataset
from nitscale.data.plan import Plan, PlanConfig
from nitscale.data.verify import verify_dataset
from nitscale.errors import UserError

CODEC = {"id": "external", "factor": 8, "channels": 4, "digest": ""}


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def folder(shapes_dataset, tmp_path):
    return shutil.copytree(shapes_dataset, tmp_path / "set")


def edit(folder, change):
    """Change the manifest."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def add(tar, name, contents):
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    tar.addfile(info, io.BytesIO(contents))


def shard_of(folder, *members):
    """A folder with one tar of these members."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, contents in members:
            add(tar, name, contents)
    return folder


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


GOOD = npy(np.zeros((4, 2, 3), np.float32))


def index(folder):
    return index_dataset(folder, CODEC, workers=1, progress=False)


@pytest.mark.parametrize("kind", ["objects", "pickle", "torch"])
def test_pickled_latents_are_never_loaded(tmp_path, kind):
    import torch

    trace = tmp_path / "trace"
    saved = io.BytesIO()
    torch.save(Bomb(trace), saved)
    name, contents = {
        "objects": ("0.npy", npy(np.array([Bomb(trace)], dtype=object))),
        "pickle": ("0.npy", pickle.dumps(Bomb(trace))),
        "torch": ("0.pth", saved.getvalue()),
    }[kind]
    with pytest.raises(UserError):
        index(shard_of(tmp_path / "set", (name, contents)))
    assert not trace.exists()


def test_other_pickles_in_a_shard_are_passed_over(tmp_path):
    trace = tmp_path / "trace"
    folder = shard_of(tmp_path / "set", ("0.npy", GOOD), ("0.pyd", pickle.dumps(Bomb(trace))), ("0.cls", b"0"))
    index(folder)
    verify_dataset(folder, progress=False)
    dataset = load_dataset(folder)
    plan = Plan(dataset, PlanConfig(0, 16, 1, flip_probability=0.0))
    assert next(iter(PackLoader(dataset, plan, plan.start()))).weights.all()
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../outside.npy", "/etc/passwd.npy", "a/../../outside.npy"])
def test_members_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="leads out of the archive"):
        index(shard_of(tmp_path / "set", (name, GOOD)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_tar_of_links_is_refused(tmp_path, kind):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.npy")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="is a link"):
        index(tmp_path / "set")


@pytest.mark.parametrize("kind", ["tar", "index"])
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "shards/../../secret", "", "a\0b"])
def test_a_manifest_that_names_objects_outside_is_refused(folder, kind, name):
    edit(folder, lambda manifest: manifest["shards"][0].update({kind: name}))
    for act in (load_dataset, verify_dataset, lambda f: inspect_dataset(f, folder / "out")):
        with pytest.raises(UserError, match=r"leads out of|no name of an object"):
            act(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(samples=10**18),
        lambda m: m["shards"][0].update(samples=10**18),
        lambda m: m["shards"][0].update(bytes=10**18),
        lambda m: m["codec"].update(channels=10**12),
        lambda m: m["codec"].update(factor=-1),
        lambda m: m.update(classes="everything"),
        lambda m: m.update(shards=[{}]),
        lambda m: m.update(grids=[[]] * 5, renditions=5),
    ],
)
def test_a_manifest_with_impossible_numbers_is_refused(folder, change):
    edit(folder, change)
    with pytest.raises(UserError):
        load_dataset(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"schema_version": 2, "codec": ' + "[" * 100_000])
def test_a_deeply_nested_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        load_dataset(folder)


def test_an_index_that_points_at_other_bytes_gives_no_sample(folder):
    """With the right hash in the manifest: the checksums of the samples stand against it."""
    path = min((folder / "index").iterdir())
    with np.load(path) as file:
        arrays = {name: file[name] for name in file} | {"offset": np.zeros(len(file["offset"]), np.int64)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    edit(folder, lambda m: next(s for s in m["shards"] if s["index"].endswith(path.name)).update(index_sha256=sha256))
    dataset = load_dataset(folder)
    lying = [i for i in range(64) if dataset.manifest.shards[dataset.index.shard_of(i)]["index"].endswith(path.name)]
    for i in lying:
        with pytest.raises(Exception, match="checksum"):
            dataset.latent(i)
    with pytest.raises(UserError, match="offset of"):
        verify_dataset(folder, progress=False)


HEADERS = {
    "npy": ("0.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{" * 100),
    "npy shape": ("0.npy", npy(np.zeros((4, 2, 3), np.float32)).replace(b"(4, 2, 3)", b"(4, 2**9)")),
    "npy huge": ("0.npy", npy(np.zeros((4, 2, 3), np.float32)).replace(b"(4, 2, 3), }   ", b"(4, 90000000000), }")),
    "safetensors": ("0.safetensors", struct.pack("<Q", 2**40) + b"{}"),
    "safetensors huge": (
        "0.safetensors",
        (lambda h: struct.pack("<Q", len(h)) + h)(
            b'{"latent": {"dtype": "F32", "shape": [4, 9000000000, 9], "data_offsets": [0, 1]}}'
        ),
    ),
    "json": ("1.json", b"[" * 900_000),
}

LIMITED = """
import resource, sys
from nitscale.data.foreign import index_dataset
from nitscale.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + int(6e9),) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    index_dataset(sys.argv[1], {"id": "external", "factor": 8, "channels": 4}, workers=1, progress=False)
except UserError as error:
    print("refused:", error)
print("grew by", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "KiB")
"""


def huge_name(kind):
    """A tar whose first header announces a name of four gigabytes, and has it: zeros on a disk with holes."""
    info = tarfile.TarInfo("name")
    info.type, info.size = kind, 4 * 2**30
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("case", [*HEADERS, "long name", "pax"])
def test_a_header_of_gigabytes_takes_no_memory(tmp_path, case):
    folder = tmp_path / "set"
    if case in HEADERS:
        shard_of(folder, HEADERS[case], ("1.npy", GOOD))
    else:
        folder.mkdir()
        with open(folder / "a.tar", "wb") as file:
            file.write(huge_name({"long name": b"L", "pax": b"x"}[case]))
            file.truncate(4 * 2**30 + 4096)
    run = subprocess.run([sys.executable, "-c", LIMITED, str(folder)], capture_output=True, text=True, timeout=120)
    assert "refused:" in run.stdout, run.stdout + run.stderr
    assert int(run.stdout.split("grew by")[1].split()[0]) < 64 * 1024
