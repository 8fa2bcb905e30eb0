"""`nitscale sample`: a checkpoint and a list of wishes → PNG files, with what they were made from in their metadata."""

from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.flow.sampling import SamplerConfig, SampleRequest
from nitscale.generate.load import load_trained
from nitscale.generate.sample import sample_images
from nitscale.layout import Grid
from nitscale.pictures import Row, contact_sheet, save_png


def sample_to_folder(
    checkpoint: Path, sizes: list[str], classes: str, seeds: str, config: SamplerConfig, out: Path
) -> list[Path]:
    """One PNG for each size, class and seed, and a contact sheet. UserError for a wish that cannot be met."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(checkpoint, device)
    labels = parse_classes(classes, trained.classes)
    requests = [
        SampleRequest(height, width, label, seed)
        for (height, width), label, seed in product(map(parse_size, sizes), labels, parse_seeds(seeds))
    ]
    paths: list[Path] = []
    made: dict[int, Tensor] = {}
    for position, _, image in sample_images(trained.model, trained.codec, requests, config):
        request = requests[position]
        name = f"class{request.label:04d}_{request.height}x{request.width}_seed{request.seed:06d}.png"
        parameters = asdict(request) | asdict(config) | {"checkpoint": str(checkpoint), "step": trained.step}
        save_png(image, out / name, parameters | {"class": trained.classes[request.label]})
        paths.append(out / name)
        made[position] = image
    columns = len(requests) // len(sizes)
    rows = []
    for start in range(0, len(requests), columns):
        row = range(start, start + columns)
        captions = [f"{trained.classes[requests[i].label]} #{requests[i].seed}" for i in row]
        rows.append(Row(f"{requests[start].height} x {requests[start].width}", [made[i] for i in row], captions))
    save_png(contact_sheet(rows), out / "contact_sheet.png", {})
    print(f"sample: {len(paths)} images of step {trained.step} in {out}, all on contact_sheet.png")
    return paths


def parse_size(text: str) -> Grid:
    """ "64x96" → (64, 96) pixels, height first."""
    try:
        height, width = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise UserError(f"sample: --size {text!r} must be HEIGHTxWIDTH in pixels, e.g. 64x96") from None
    return height, width


def parse_classes(text: str, names: list[str]) -> list[int]:
    """ "all", or names and numbers of classes, separated by commas."""
    if text == "all":
        return list(range(len(names)))
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if part in names:
            labels.append(names.index(part))
        elif part.isdecimal() and int(part) < len(names):
            labels.append(int(part))
        else:
            raise UserError(
                f"sample: class {part!r} is unknown; classes are 0 to {len(names) - 1}: {', '.join(names[:20])}"
            )
    return labels


def parse_seeds(text: str) -> list[int]:
    """ "0-7" or "1,5,9" → a list."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        raise UserError(f"sample: --seeds {text!r} must be like 0-7 or 1,5,9") from None
    if not seeds:
        raise UserError(f"sample: --seeds {text!r} names no seed; write the smaller number first, e.g. 0-7")
    return seeds
