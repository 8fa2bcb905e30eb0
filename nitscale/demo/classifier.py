"""A fixed judge of the built-in picture set: which layout does a picture show?

It compares pixels with drawn layouts of several thicknesses and knows nothing of the model. The ground's colour and
gradient are fitted away by least squares; the layout whose two-coloured figure explains most of what remains is the
answer. There is none if it explains less than half of that, or if the ground alone explains nearly everything.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nitscale.demo.shapes import CLASSES, THICKNESS, centres, layout_mask

NONE = -1
"""The answer for a picture that shows no layout clearly."""
NEEDED = 0.5
"""Share that a layout must explain of the variance that the ground leaves."""
FIGURE = 0.25
"""Share of a picture's variance that the ground must leave."""
THICKNESSES = np.linspace(THICKNESS[0], THICKNESS[1], 5)


def classify(image: Tensor) -> tuple[int, float]:
    """Class of a picture (3, H, W), a position in CLASSES or NONE, and the share (0 to 1) that it explains of
    what the ground leaves."""
    height, width = image.shape[-2:]
    labels, layouts, ground = templates(height, width)
    pixels = image.double().flatten(1).T.numpy()
    rest = pixels - ground @ (ground.T @ pixels)
    variance = (rest**2).sum()
    if variance < max(FIGURE * ((pixels - pixels.mean(0)) ** 2).sum(), 1e-6 * pixels.size):
        return NONE, 0.0
    explained = ((layouts @ rest) ** 2).sum(1) / variance
    best = int(explained.argmax())
    return (int(labels[best]) if explained[best] >= NEEDED else NONE), float(explained[best])


@lru_cache(maxsize=256)
def templates(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class (k,) and unit layout (k, H·W) of every template, and an orthonormal basis (H·W, 3) of grounds:
    constant and the two slopes."""
    across = np.broadcast_to(centres(width)[None, :], (height, width))
    down = np.broadcast_to(centres(height)[:, None], (height, width))
    ground, _ = np.linalg.qr(np.stack([np.ones((height, width)), across, down], -1).reshape(-1, 3))
    labels, layouts = [], []
    for label, name in enumerate(CLASSES):
        masks = {layout_mask(name, height, width, thickness).tobytes(): thickness for thickness in THICKNESSES}
        for thickness in masks.values():  # layouts without a thickness have one template
            mask = layout_mask(name, height, width, thickness).reshape(-1).astype(np.float64)
            mask -= ground @ (ground.T @ mask)
            labels.append(label)
            layouts.append(mask / np.linalg.norm(mask))
    return np.array(labels), np.stack(layouts), ground


def agreement(images: list[Tensor], labels: list[int]) -> float:
    """Share of pictures whose class is the one wanted."""
    return float(torch.tensor([classify(i)[0] == y for i, y in zip(images, labels, strict=True)]).float().mean())
