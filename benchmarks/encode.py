"""The encode pipeline in numbers: how busy each stage's threads are, and how long the encoder waits for a batch.

    python benchmarks/encode.py                                  the DCT codec, and a DC-AE of 1/16 of the width
    python benchmarks/encode.py --device cuda --width 128 --images 20000 --workers 16

The photos are drawn by this script: JPEG, sizes like ImageNet's, about 0.2 megapixels. The DC-AE has the layers and
blocks of the published f32c32 and random weights; it needs diffusers. Shares are of the time of a stage's threads.
"""

import argparse
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep.encode import EncodeConfig, JobOptions, encode
from data_prep.report import EncodeReport

SIZES = ((375, 500), (375, 500), (375, 500), (500, 375), (333, 500), (500, 333), (500, 500), (400, 600), (768, 1024))
"""(height, width) that the photos have in turn."""
COLUMNS = ("read", "decode", "resize", "encode", "write", "publish")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="photos (400)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (cpu)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="decoding threads (cores)")
    parser.add_argument("--width", type=int, default=8, help="channels of the DC-AE's first level; published: 128 (8)")
    parser.add_argument("--codec-dtype", help="bfloat16 or float32 (float32 on a CPU)")
    parser.add_argument("--resize", default="native", help="resize rules (native)")
    options = parser.parse_args()
    dtype = options.codec_dtype or ("float32" if options.device == "cpu" else "bfloat16")
    print(machine(options.device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mib = draw_photos(folder / "photos", options.images)
        print(f"{options.images} photos of {mib / options.images:.2f} MiB; {options.workers} decoding threads\n")
        print(f"{'codec':22} {'images/s':>8}", *(f"{column:>8}" for column in (*COLUMNS, "waits")))
        for codec, about in (("dct", "DCT f16c32"), (save_dc_ae(folder / "dc-ae", options.width), "DC-AE f32c32")):
            report = encode(
                folder / "photos",
                folder / about,
                EncodeConfig(resize=tuple(options.resize.split(",")), shard_samples=1024),
                codec=codec,
                codec_dtype=dtype,
                options=JobOptions(device=options.device, workers=options.workers, progress=False),
            )
            about += f", width {options.width}" if codec != "dct" else ""
            print_row(about, report)


def print_row(about: str, report: EncodeReport) -> None:
    """One codec's line: what part of their time the threads of each stage worked."""
    threads = {"read": report.workers, "decode": report.workers, "resize": report.workers}
    shares = [report.stages.get(column, 0.0) / (report.worked_seconds * threads.get(column, 1)) for column in COLUMNS]
    rate = report.worked_images / report.worked_seconds
    print(f"{about:22} {rate:8,.1f}", *(f"{share:8.1%}" for share in (*shares, report.encoder_wait)), flush=True)


def draw_photos(folder: Path, count: int) -> float:
    """Draw photos into `folder`; their MiB. A few large ones are cut in different places: JPEG takes no shorter."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    canvases = [draw_canvas(generator) for _ in range(4)]
    total = 0
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        canvas = canvases[number % len(canvases)]
        top, left = generator.integers(0, canvas.height - height), generator.integers(0, canvas.width - width)
        canvas.crop((left, top, left + width, top + height)).save(buffer := io.BytesIO(), "JPEG", quality=92)
        (folder / f"{number:06d}.jpg").write_bytes(buffer.getvalue())
        total += len(buffer.getvalue())
    return total / 2**20


def draw_canvas(generator: np.random.Generator) -> Image.Image:
    """A picture of 1600 x 2000 pixels with structure of every size, as photos have it."""
    pixels = np.zeros((1600, 2000, 3))
    for level in range(8):
        coarse = generator.normal(size=(1600 >> level or 1, 2000 >> level or 1, 3)) * 5 * 1.55**level
        layers = [Image.fromarray(coarse[..., c].astype(np.float32)).resize((2000, 1600)) for c in range(3)]
        pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1)
    return Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8))


def save_dc_ae(folder: Path, width: int) -> str:
    """A DC-AE like the published f32c32 of `width` channels in its first level (published: 128), random weights."""
    import diffusers

    channels = tuple(width * factor for factor in (1, 2, 4, 4, 8, 8))
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    torch.manual_seed(0)
    model = diffusers.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=min(32, 4 * width),
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    model.save_pretrained(folder)
    return str(folder)


def machine(device: str) -> str:
    """The machine and the versions, in a line."""
    cpu = platform.processor() or platform.machine()
    if shutil.which("lscpu"):
        lines = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("Model name")), cpu)
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.startswith("cuda") else ""
    names = ("torch", "pillow", "diffusers", "webdataset")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{gpu}{len(os.sched_getaffinity(0))} cores of {cpu}; Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
