"""`nitscale data inspect`: what is in a dataset, as a table, and as pictures on one page that needs no network."""

import html
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from nitscale.data.manifest import Dataset, load_dataset
from nitscale.data.shards import UnreadableSample
from nitscale.errors import UserError
from nitscale.files import atomic_write
from nitscale.randomness import permutation

THUMBNAILS = 48
THUMBNAIL_PIXELS = 1 << 20
"""Larger images are not decoded for the sheet: it shows many, not large ones."""
RATIOS = {"below 1:2": 0, "1:2 to 3:4": 0.5, "3:4 to 4:3": 0.75, "4:3 to 2:1": 4 / 3, "above 2:1": 2.0}
"""Classes of width : height, and where each begins."""


def inspect_dataset(prefix: str | Path, out: Path, patch_size: int = 1) -> str:
    """Write pictures and `index.html` into the folder `out`; the table, for people. UserError as `load_dataset`."""
    dataset = load_dataset(prefix)
    rows = table(dataset, patch_size)
    pictures = {
        "sizes.png": sizes_figure(dataset),
        "tokens.png": tokens_figure(dataset, patch_size),
        "classes.png": classes_figure(dataset),
    }
    try:
        pictures["images.png"] = images_figure(dataset)
    except (UserError, UnreadableSample) as error:
        rows.append(("thumbnails", f"none: {error}"))
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(out / name, dpi=110)
    atomic_write(out / "index.html", page(str(prefix), rows, list(pictures)).encode())
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:>{width}}  {value}" for name, value in rows), f"\npictures: {out / 'index.html'}"])


def table(dataset: Dataset, patch_size: int) -> list[tuple[str, str]]:
    """Name and value of what a dataset is."""
    manifest, index = dataset.manifest, dataset.index
    tokens = (index.rows // patch_size).astype(np.int64) * (index.columns // patch_size)
    counts = np.bincount(index.label, minlength=len(manifest.classes))
    sizes, how_often = np.unique(index.rows.astype(np.int64) << 32 | index.columns, return_counts=True)
    frequent = [
        f"{int(sizes[i] >> 32) * manifest.factor} x {int(sizes[i] & 0xFFFFFFFF) * manifest.factor} "
        f"({how_often[i] / index.num_samples:.1%})"
        for i in np.argsort(-how_often, kind="stable")[:6]
    ]
    ratio = index.columns / index.rows
    kind = np.searchsorted(list(RATIOS.values()), ratio, side="right") - 1
    shares = np.bincount(kind, minlength=len(RATIOS)) / len(ratio)
    ratios = [f"{name} {share:.1%}" for name, share in zip(RATIOS, shares, strict=True)]
    renditions = np.bincount(index.rendition, minlength=len(manifest.renditions))
    size = sum(shard["bytes"] for shard in manifest.shards)
    codec = manifest.codec
    cell = f"{manifest.factor} x {manifest.factor} pixels"
    kinds = zip(manifest.renditions, renditions.tolist(), strict=True)
    return [
        ("samples", f"{manifest.samples:,}"),
        ("tokens", f"{tokens.sum():,} at patch size {patch_size}: {tokens.mean():,.1f} on average, "
                   f"{np.median(tokens):,.0f} in the median, {tokens.max():,} at most"),
        ("sizes", f"{len(sizes):,} different, height x width in pixels: " + ", ".join(frequent)),
        ("width : height", ", ".join(ratios)),
        ("classes", f"{len(counts):,} of {counts.min():,} to {counts.max():,} samples, "
                    f"{np.median(counts):,.0f} in the median"),
        ("renditions", ", ".join(f"{name} {number:,}" for name, number in kinds)),
        ("latents", f"{manifest.dtype}, {manifest.channels} channels, a cell is {cell}, "
                    f"{'with' if manifest.flips else 'without'} mirror images"),
        ("codec", " ".join(str(codec[name]) for name in ("id", "source") if name in codec)),
        ("beside latents", ", ".join(manifest.members) or "nothing"),
        ("shards", f"{len(manifest.shards):,}, {size / 1e9:,.3f} GB, {size / manifest.samples / 1e3:,.1f} KB a sample"),
        ("version", manifest.digest),
    ]  # fmt: skip


def sizes_figure(dataset: Dataset) -> Figure:
    """How many images there are of each height and width, by colour."""
    index, factor = dataset.index, dataset.manifest.factor
    cells = [math.ceil((int(side.max()) + 1) / 64) for side in (index.rows, index.columns)]  # at most 64 bins a side
    counts = np.zeros((int(index.rows.max()) // cells[0] + 1, int(index.columns.max()) // cells[1] + 1))
    np.add.at(counts, (index.rows // cells[0], index.columns // cells[1]), 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    extent = (0, counts.shape[1] * cells[1] * factor, 0, counts.shape[0] * cells[0] * factor)
    shown = np.ma.masked_equal(counts, 0)
    image = axes.imshow(shown, origin="lower", extent=extent, norm=LogNorm(1, max(2, counts.max())), cmap="viridis")
    axes.set(xlabel="width / pixels", ylabel="height / pixels", title="sizes")
    figure.colorbar(image, label="images", shrink=0.8)
    return figure


def tokens_figure(dataset: Dataset, patch_size: int) -> Figure:
    """A histogram of tokens an image, and which share of all tokens lies in images up to a length."""
    index = dataset.index
    tokens = (index.rows // patch_size).astype(np.int64) * (index.columns // patch_size)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    bins = np.geomspace(max(1, tokens.min()), tokens.max() + 1, 60)
    axes.hist(tokens, np.unique(bins.round()).tolist(), color="#3b6ea5")
    axes.set(xscale="log", yscale="log", xlabel="tokens of an image", ylabel="images", title="lengths")
    ordered = np.sort(tokens)
    right = axes.twinx()
    right.plot(ordered, ordered.cumsum() / ordered.sum(), color="#c2571a")
    right.set(ylim=(0, 1.02), ylabel="share of all tokens in images up to here")
    right.yaxis.label.set_color("#c2571a")
    return figure


def classes_figure(dataset: Dataset) -> Figure:
    """Images of each class, the most frequent first; with names where there is room."""
    names = dataset.manifest.classes
    counts = np.bincount(dataset.index.label, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(len(order)), counts[order], width=1.0 if len(order) > 40 else 0.8, color="#4c8c5a")
    axes.set(ylabel="images", title="classes", ylim=(0, None))
    if len(order) <= 40:
        axes.set_xticks(range(len(order)), [names[i][:24] for i in order], rotation=60, ha="right", fontsize=8)
    else:
        axes.set_xlabel("classes, the most frequent first")
    return figure


@torch.inference_mode()
def images_figure(dataset: Dataset) -> Figure:
    """Some images at random, decoded by the codec. UserError if it cannot be loaded, UnreadableSample if none can."""
    codec, index, factor = dataset.codec(), dataset.index, dataset.manifest.factor
    found: list[tuple[np.ndarray, str]] = []
    reason: Exception = UnreadableSample("all images are too large for a sheet")
    for i in permutation(index.num_samples, "thumbnails")[: 4 * THUMBNAILS].tolist():
        height, width = int(index.rows[i]) * factor, int(index.columns[i]) * factor
        if height * width > THUMBNAIL_PIXELS or len(found) == THUMBNAILS:
            continue
        try:
            decoded = codec.decode(dataset.latent(i)[None].float())[0]
        except UnreadableSample as error:
            reason = error
            continue
        pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        found.append((pixels, f"{dataset.manifest.classes[index.label[i]][:18]}\n{height} x {width}"))
    if not found:
        raise reason
    columns = min(8, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (pixels, title) in zip(figure.axes, found, strict=False):
        axes.imshow(pixels)
        axes.set_title(title, fontsize=7)
    return figure


def page(prefix: str, rows: list[tuple[str, str]], pictures: list[str]) -> str:
    """The table and the pictures as HTML."""
    lines = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    images = "".join(f'<img src="{name}" alt="{name.removesuffix(".png")}">' for name in pictures)
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;color:#222}"
        "th{text-align:right;padding-right:1rem;vertical-align:top;white-space:nowrap;color:#666;font-weight:500}"
        "td{overflow-wrap:anywhere}img{max-width:49%;vertical-align:top}img[alt=images]{max-width:100%}"
    )
    title = html.escape(prefix)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return f"<!doctype html>{head}<h1>{title}</h1><table>{lines}</table>{images}\n"
