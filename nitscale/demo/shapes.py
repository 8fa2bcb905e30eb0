"""The built-in picture set: eight layouts in random colours on varied backgrounds, at many native sizes.

The class of a picture is its layout alone: colours, gradient, thickness and place vary, so that no colour and no single
patch tells the class. Layouts are drawn in relation to the picture's own sides, so that they exist at every size and
aspect ratio; the mirror image of a picture is one of the same class.
"""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import reduce
from PIL import Image
from tqdm import tqdm

from nitscale.files import atomic_write
from nitscale.randomness import key_digest

SUPERSAMPLING = 2
"""Points a pixel side at which a layout's edge is drawn."""
LUMA = np.array([0.299, 0.587, 0.114])
STRIPES = 5
CHECKS = 4


@dataclass(frozen=True)
class Canvas:
    """Coordinates of a picture's points, each (H, W)."""

    u: np.ndarray
    """Across, -1 to 1."""
    v: np.ndarray
    """Down, -1 to 1."""
    x: np.ndarray
    """Across, in halves of the shorter side."""
    y: np.ndarray
    right: float
    """x of the right edge: half the width in halves of the shorter side."""
    bottom: float

    @classmethod
    def of(cls, height: int, width: int) -> "Canvas":
        v, u = np.meshgrid(centres(height), centres(width), indexing="ij")
        shorter = min(height, width)
        right, bottom = width / shorter, height / shorter
        return cls(u, v, u * right, v * bottom, right, bottom)


def centres(n: int) -> np.ndarray:
    return (np.arange(n) + 0.5) / n * 2 - 1


LAYOUTS: dict[str, Callable[[Canvas, float], np.ndarray]] = {
    "checkerboard": lambda c, _: (np.floor((c.u + 1) / 2 * CHECKS) + np.floor((c.v + 1) / 2 * CHECKS)) % 2 == 0,
    "cross": lambda c, thickness: (abs(c.x) < thickness) | (abs(c.y) < thickness),
    "disc": lambda c, thickness: np.hypot(c.x, c.y) < 0.45 + thickness,
    "frame": lambda c, thickness: (c.right - abs(c.x) < thickness) | (c.bottom - abs(c.y) < thickness),
    "horizontal stripes": lambda c, _: np.floor((c.v + 1) / 2 * STRIPES) % 2 == 0,
    "quarters": lambda c, _: c.u * c.v > 0,
    "triangle": lambda c, _: (abs(c.u) < (c.v + 0.9) / 1.8 * 0.95) & (abs(c.v) < 0.9),
    "vertical stripes": lambda c, _: np.floor((c.u + 1) / 2 * STRIPES) % 2 == 0,
}
"""Each class's layout: where the figure is, given a canvas and a thickness in halves of the shorter side."""
CLASSES = tuple(sorted(LAYOUTS))
THICKNESS = (0.20, 0.32)
SAVE_OPTIONS = {".jpg": {"quality": 92}, ".png": {"compress_level": 1}}


def layout_mask(name: str, height: int, width: int, thickness: float) -> np.ndarray:
    """The figure of a layout, (height, width) in [0, 1], with smooth edges."""
    inside = LAYOUTS[name](Canvas.of(height * SUPERSAMPLING, width * SUPERSAMPLING), thickness)
    return reduce(inside.astype(np.float32), "(h s) (w t) -> h w", "mean", s=SUPERSAMPLING, t=SUPERSAMPLING)


def draw(name: str, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """A picture of the class `name`, (height, width, 3) uint8: figure and ground differ well in brightness."""
    mask = layout_mask(name, height, width, random.uniform(*THICKNESS))[..., None]
    while True:
        figure, ground = random.uniform(0.05, 0.95, (2, 3))
        if abs((figure - ground) @ LUMA) > 0.2 and np.linalg.norm(figure - ground) > 0.6:
            break
    angle, strength = random.uniform(0, 2 * np.pi), random.uniform(0, 0.12)
    slope = np.cos(angle) * centres(width)[None, :] + np.sin(angle) * centres(height)[:, None]
    picture = mask * figure + (1 - mask) * (ground + strength * slope[..., None])
    grain = random.normal(0, 0.01, (height, width, 1))
    return (np.clip(picture + grain, 0, 1) * 255).round().astype(np.uint8)


def random_size(random: np.random.Generator, sides: tuple[int, int], largest_ratio: float) -> tuple[int, int]:
    """(height, width) with both sides in the range and no more than the ratio apart."""
    while True:
        height, width = (int(side) for side in random.integers(sides[0], sides[1] + 1, 2))
        if max(height, width) <= largest_ratio * min(height, width):
            return height, width


def draw_folder(folder: Path, images: int, sides: tuple[int, int], largest_ratio: float, *key: str | int) -> None:
    """`images` pictures, as many of each class, in `folder`/CLASS/NNNNN.png or .jpg; those already there are kept.

    Picture i is a pure function of `key` and i. Every fourth is a JPEG.
    """

    def make(i: int) -> None:
        name = CLASSES[i % len(CLASSES)]
        path = folder / name / f"{i:05d}{'.jpg' if i % 4 == 0 else '.png'}"
        if path.exists():
            return
        random = np.random.Generator(np.random.Philox(key=key_digest("shapes", *key, i)))
        picture = Image.fromarray(draw(name, *random_size(random, sides, largest_ratio), random))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG", **SAVE_OPTIONS[path.suffix])
        atomic_write(path, buffer.getvalue())

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(make, range(images)), total=images, desc="draw", unit="image"):
            pass
