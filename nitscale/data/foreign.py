"""`nitscale data index`: index and manifest for latents that someone else wrote as WebDataset tars.

The tars stay as they are; beside them come `index/…npz`, one a tar, and the manifest, written last. An index is
remembered with the size of its tar (and is made again when that changes), so that an interrupted job goes on.
"""

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nitscale.data.index import LatentKind, index_bytes, index_tar, read_arrays
from nitscale.data.manifest import MANIFEST, Manifest
from nitscale.data.shards import EXTRA_MEMBERS
from nitscale.data.storage import RangedFile, Storage, open_storage
from nitscale.data.tars import DamagedTar, scan
from nitscale.errors import UserError

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".pyd", ".bin")
"""Reading these could run code: they are never opened."""
LABEL_KEYS = ("label", "class", "cls")


def index_dataset(
    prefix: str | Path,
    codec: dict[str, Any],
    classes: tuple[str, ...] | None = None,
    label_key: str | None = None,
    latent: str | None = None,
    workers: int = 8,
    progress: bool = True,
) -> str:
    """Make index and manifest for the tars below `prefix`; a line about the dataset.

    `codec`: its `spec()`, with factor and channels at least. Labels are numbers in .cls or in .json under `label_key`
    (default: label, class, cls), or names of `classes`; samples without any are of class 0. `latent`: the suffix of the
    latents, found by itself where there is one kind of .npy or .safetensors. UserError that names tar and member where
    something cannot be.
    """
    storage = open_storage(prefix)
    tars = {name: size for name, size in storage.list("", recursive=True).items() if name.endswith(".tar")}
    if not tars:
        raise UserError(f"index: no .tar below {prefix}; name the folder or prefix with the WebDataset tars of latents")
    suffix = latent_suffix(storage, next(iter(tars)), latent)
    describe = describer(classes, label_key)
    entries: list[dict[str, Any]] = []
    bar = tqdm(total=len(tars), desc="index", unit="tar", disable=None if progress else True)
    with bar, ThreadPoolExecutor(workers, thread_name_prefix="index") as pool:
        for entry in pool.map(lambda name: index_one(storage, name, tars[name], describe, suffix), tars):
            entries.append(entry)
            bar.update()
    manifest = build(storage, codec, classes, suffix, entries)
    storage.write(MANIFEST, manifest.to_json().encode())
    return (
        f"index: {manifest.samples:,} samples of {manifest.dtype} latents in {len(tars):,} tars, "
        f"{len(manifest.classes):,} classes: {prefix} (version {manifest.digest[:12]})"
    )


def latent_suffix(storage: Storage, name: str, wanted: str | None) -> str:
    """The suffix of latents in a dataset, by its first tar. UserError if it is not clear, or they are pickles."""
    if wanted is not None:
        if wanted.lower().endswith(PICKLES):
            raise UserError(f"index: {wanted} is a pickle, which could run code; write latents as .npy or .safetensors")
        return f".{wanted.removeprefix('.')}"
    suffixes: Counter[str] = Counter()
    try:
        for member in scan(RangedFile(storage, name, 1 << 16)):
            base = member.name.rpartition("/")[2]
            suffixes["." + base.partition(".")[2]] += 1
            if suffixes.total() == 64:
                break
    except DamagedTar as error:
        raise UserError(f"index: {storage.prefix}/{name} is damaged: {error}; copy it again") from error
    arrays = [suffix for suffix in suffixes if suffix.endswith((".npy", ".safetensors"))]
    found = [suffix for suffix in arrays if suffix not in EXTRA_MEMBERS.values()]
    if len(found) == 1:
        return found[0]
    members = ", ".join(suffixes) or "none"
    if any(suffix.endswith(PICKLES) for suffix in suffixes) and not found:
        raise UserError(
            f"index: the latents in {name} are pickles (members {members}), which could run code; "
            "write them as .npy or .safetensors"
        )
    raise UserError(f"index: which members of {name} are latents? It has {members}; say it with --latent")


def describer(classes: tuple[str, ...] | None, label_key: str | None) -> Callable[[dict[str, bytes]], tuple[int, int]]:
    """Label and rendition of a sample by its .cls or .json."""

    def describe(texts: dict[str, bytes]) -> tuple[int, int]:
        found: Any = texts[".cls"].decode().strip() if ".cls" in texts and label_key is None else None
        if found is None and ".json" in texts:
            about = json.loads(texts[".json"])
            keys = LABEL_KEYS if label_key is None else (label_key,)
            found = next((about[key] for key in keys if key in about), None) if isinstance(about, dict) else None
        if found is None:
            if label_key is not None or classes is not None:
                raise ValueError(f"it has no class under {label_key or ', '.join(LABEL_KEYS)}")
            return 0, 0
        if classes is not None and str(found) in classes:
            return classes.index(str(found)), 0
        if not re.fullmatch(r"\d{1,9}", str(found)):
            raise ValueError(f"class {found!r} is no number, and not in the list of classes; give --classes FILE")
        return int(found), 0

    return describe


def index_one(
    storage: Storage, name: str, size: int, describe: Callable[[dict[str, bytes]], tuple[int, int]], suffix: str
) -> dict[str, Any]:
    """The entry of a tar, whose index is made, or was made before from a tar of this size in the same way."""
    stem = re.sub(r"[^\w-]+", "_", name.removesuffix(".tar"))
    index, marker = (f"index/{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}{end}" for end in (".npz", ".json"))
    try:
        entry: dict[str, Any] = json.loads(storage.read(marker))
        data = storage.read(index)
        if entry["bytes"] == size and hashlib.sha256(data).hexdigest() == entry["index_sha256"]:
            return entry
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="nitscale-index-") as folder:
            path = Path(storage.prefix, name)
            if "://" in storage.prefix:
                path = Path(folder, "shard.tar")
                storage.download(name, path, size)
            arrays, kind = index_tar(path, describe, (suffix,))
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        raise UserError(f"{error}; mend or remove {storage.prefix}/{name}") from error
    data = index_bytes(arrays)
    entry = {"tar": name, "index": index, "samples": len(arrays["keys"]), "bytes": size, "sha256": sha256}
    entry |= {"index_sha256": hashlib.sha256(data).hexdigest(), "kind": list(kind)}
    storage.write(index, data)
    storage.write(marker, json.dumps(entry).encode())
    return entry


def build(
    storage: Storage, codec: dict[str, Any], classes: tuple[str, ...] | None, suffix: str, entries: list[dict[str, Any]]
) -> Manifest:
    """The manifest of indexed tars. UserError if their latents are not of one kind, or not the codec's."""
    kinds = {LatentKind(*entry["kind"]): entry["tar"] for entry in entries}
    if len(kinds) > 1:
        raise UserError("index: tars of different latents: " + "; ".join(f"{tar} has {k}" for k, tar in kinds.items()))
    (kind,) = kinds
    if kind.channels != codec.get("channels"):
        raise UserError(f"index: the latents have {kind.channels} channels, the codec {codec.get('channels')!r}")
    grids: Counter[tuple[int, int]] = Counter()
    members: list[set[str]] = []
    most = 0
    for entry in entries:
        data = storage.read(entry["index"])
        arrays = read_arrays(data, ("rows", "columns", "label"))
        grids.update(zip(arrays["rows"].tolist(), arrays["columns"].tolist(), strict=True))
        most = max(most, int(arrays["label"].max()))
        members.append({member for member in EXTRA_MEMBERS if f"{member}_offset.npy".encode() in data})
    if classes is not None and most >= len(classes):
        raise UserError(f"index: there is a label {most}, but {len(classes)} classes; mend the list of classes")
    return Manifest(
        codec=codec,
        dtype=kind.dtype,
        flips=kind.variants == 2,
        classes=list(classes or map(str, range(most + 1))),
        samples=sum(entry["samples"] for entry in entries),
        tokens=sum(rows * columns * count for (rows, columns), count in grids.items()),
        grids={f"{rows} x {columns}": count for (rows, columns), count in sorted(grids.items())},
        shards=[{name: value for name, value in entry.items() if name != "kind"} for entry in entries],
        renditions=["unknown"],
        latent_suffixes=[suffix],
        members=sorted(set.intersection(*members)),
    )


def read_codec(file: Path | None, factor: int | None, channels: int | None) -> dict[str, Any]:
    """The codec's description in a JSON file, or one of an autoencoder that this build does not know."""
    if file is not None:
        try:
            spec = json.loads(file.read_text())
            if not (int(spec["factor"]) > 0 and int(spec["channels"]) > 0):
                raise ValueError("they must be positive")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"index: {file} is no description of a codec with factor and channels: {error}") from error
        return dict(spec)
    if not factor or not channels:
        raise UserError("index: give --codec FILE.json, or --factor (pixels of a cell's side) and --channels")
    return {"id": "external", "factor": factor, "channels": channels, "digest": ""}


def read_classes(file: Path | None) -> tuple[str, ...] | None:
    """Class names, one a line. UserError if the file cannot be read or has a name twice."""
    if file is None:
        return None
    try:
        names: Iterable[str] = (line.strip() for line in file.read_text().splitlines())
        classes = tuple(name for name in names if name)
    except (OSError, ValueError) as error:
        raise UserError(f"classes: cannot read {file}: {error}") from error
    if not classes or len(set(classes)) < len(classes):
        raise UserError(f"classes: {file} has no class, or one twice; give one name a line")
    return classes
