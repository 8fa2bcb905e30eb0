"""Which size an image is encoded at: pure functions of (height, width) and the sample's key, and the resampling itself.

| rule       | size                                                                             | source            |
|------------|----------------------------------------------------------------------------------|-------------------|
| native     | its own, sides floored to the multiple; scaled down to `max_tokens` tokens       | NiT               |
| square-N   | N x N: the short side scaled to N, centre crop                                   | ADM, NiT          |
| area-N     | as native, scaled down to an area of N² pixels; thin images scaled up            | FiT, FiTv2        |
| mixed-N    | if both sides exceed N, with probability 1/2 a centre crop of N x N; else area-N | FiTv2 algorithm 1 |

All sides are multiples of `multiple` pixels, and at least one. `square-N`, `area-N` and `mixed-N` never make more than
N² pixels. `native` makes more than `max_tokens` tokens only of a sliver whose short side was stretched to one multiple.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nitscale.errors import UserError
from nitscale.randomness import bernoulli

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Target:
    """What becomes of an image: halved by box filter so many times, resampled to `size`, then cropped at the centre."""

    size: Size
    halvings: int = 0
    crop: Size | None = None

    @property
    def final(self) -> Size:
        """(height, width) of the result."""
        return self.crop or self.size


@dataclass(frozen=True)
class Rule:
    """A resize rule. `name` is its name in the manifest."""

    name: str
    _target: Callable[[int, int, int, int, str], Target]

    def target(self, height: int, width: int, multiple: int, max_tokens: int, key: str) -> Target:
        """What becomes of an image of (height, width) pixels: sides are multiples of `multiple` pixels, a token's side.
        `native` alone looks at `max_tokens`; `mixed-N` alone at the sample's `key`, which its coin depends on.

        UserError if N is not a multiple of `multiple`."""
        return self._target(height, width, multiple, max_tokens, key)


def parse_rule(name: str) -> Rule:
    """The rule called `name`. UserError if there is none."""
    if name == "native":
        return Rule(name, lambda h, w, side, tokens, key: Target(native_size(h, w, side, side * tokens**0.5)))
    match = re.fullmatch(r"(square|area|mixed)-([1-9]\d*)", name)
    if match is None:
        raise UserError(
            f"encode: unknown resize rule {name!r}; choose native, square-256, area-256, mixed-256 or the like"
        )
    kind, side = match[1], int(match[2])

    def target(height: int, width: int, multiple: int, max_tokens: int, key: str) -> Target:
        if side % multiple:
            nearest = max(1, round(side / multiple)) * multiple
            raise UserError(
                f"encode: {name} does not fit the codec: {side} is not a multiple of {multiple} pixels (its factor x "
                f"patch_size); use {kind}-{nearest}"
            )
        large = min(height, width) > side
        if kind == "square" or (kind == "mixed" and large and bernoulli(1, 0.5, name, key)[0]):
            return square_target(height, width, side)
        return Target(area_size(height, width, multiple, side))

    return Rule(name, target)


def native_size(height: int, width: int, multiple: int, max_size: float) -> Size:
    """NiT's native-resolution rule (arXiv 2506.03131, published preprocessing code) → (height, width) in pixels.

    Below max_size² pixels each side is floored to a multiple of `multiple`, at least one; from there on the image is
    first scaled to an area of max_size², keeping its aspect ratio. The floating-point operations are those of the
    published code in their order, because a different one changes the size of some images. Where that code arrives
    at a side of zero pixels (and fails), the side is one multiple.
    """
    if width * height < max_size**2:
        new_width, new_height = float(width), float(height)
    else:
        new_width = float(np.sqrt(width / height) * max_size)
        new_height = new_width * height / width
    return floor_to(new_height, multiple), floor_to(new_width, multiple)


def area_size(height: int, width: int, multiple: int, side: int) -> Size:
    """FiT's rule (arXiv 2402.12376 and 2410.13925, published preprocessing code) → (height, width) in pixels.

    As `native_size` with an area of side², but an image with a side of less than one multiple is first scaled up until
    it has one. Where that takes it beyond side² pixels again, the long side gives way.
    """
    if width * height >= side**2 or min(height, width) >= multiple:
        height, width = native_size(height, width, multiple, side)
    elif width < multiple:
        height, width = floor_to(multiple * height / width, multiple), multiple
    else:
        height, width = multiple, floor_to(multiple * width / height, multiple)
    longest = side**2 // min(height, width) // multiple * multiple
    return min(height, longest), min(width, longest)


def floor_to(length: float, multiple: int) -> int:
    """The length floored to a multiple, at least one."""
    return max(1, int(length / multiple)) * multiple


def square_target(height: int, width: int, side: int) -> Target:
    """ADM's centre crop (arXiv 2105.05233, the published code's arithmetic): halved while the short side is at least
    twice `side`, then the short side scaled to `side`, then cropped."""
    halvings = 0
    while min(height, width) >= 2 * side:
        height, width, halvings = height // 2, width // 2, halvings + 1
    scale = side / min(height, width)
    return Target((round(height * scale), round(width * scale)), halvings, (side, side))


def apply(image: Image.Image, target: Target) -> Image.Image:
    """The image as the target says, by bicubic resampling with antialiasing, as published."""
    for _ in range(target.halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    height, width = target.size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if target.crop is None or target.crop == target.size:
        return image
    top, left = (height - target.crop[0]) // 2, (width - target.crop[1]) // 2
    return image.crop((left, top, left + target.crop[1], top + target.crop[0]))
