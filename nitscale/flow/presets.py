"""How the published models are sampled: one row for each model and image size.

NiT: the table "Sampling Hyper-parameters" of its repository (NiT-XL after 1,000,000 steps), which the paper's table 7
agrees with but at 1536² and 2048², where the paper prints scale 1.5 without an interval. FiT: the commands of its
repository. Sizes are pixels, (height, width).
"""

import math
from dataclasses import dataclass

from nitscale.errors import UserError
from nitscale.flow.guidance import Guidance


@dataclass(frozen=True)
class Sampling:
    """A sampler of `nitscale.flow.samplers` or `nitscale.flow.ddpm`, its steps, and the guidance."""

    sampler: str
    num_steps: int
    guidance: Guidance


def _nit(sampler: str, num_steps: int, scale: float, until: float) -> Sampling:
    return Sampling(sampler, num_steps, Guidance(scale, (0.0, until)))


def _fit(scale: float, sampler: str = "dopri5") -> Sampling:
    """FiT's code guides the first three latent channels of four. An adaptive solver chooses its own steps."""
    return Sampling(sampler, 250, Guidance(scale, channels=3))


NIT = {
    (256, 256): _nit("sde", 250, 2.25, 0.7),
    (512, 512): _nit("sde", 250, 2.05, 0.7),
    (768, 768): _nit("euler", 50, 3.0, 0.7),
    (1024, 1024): _nit("euler", 50, 3.0, 0.8),
    (1536, 1536): _nit("euler", 50, 3.5, 0.9),
    (2048, 2048): _nit("euler", 50, 4.5, 0.9),
    (320, 960): _nit("euler", 50, 4.0, 0.9),
    (432, 768): _nit("euler", 50, 2.75, 0.7),
    (480, 640): _nit("euler", 50, 2.75, 0.7),
    (640, 480): _nit("euler", 50, 2.5, 0.7),
    (768, 432): _nit("euler", 50, 2.85, 0.7),
    (960, 320): _nit("euler", 50, 4.5, 0.9),
}

FIT = {
    "fitv2-b": _fit(1.5),
    "fitv2-xl": _fit(1.5),
    "fitv2-3b": _fit(1.5),
    "fitv2-b-hr": _fit(1.65),
    "fitv2-xl-hr": _fit(1.65),
    "fitv2-3b-hr": _fit(1.5),
    "fit-xl": _fit(1.5, "ancestral"),
}


def sampling_preset(model: str, height: int, width: int) -> Sampling:
    """The published sampling of a preset's model at the published size that is nearest in area and aspect ratio."""
    if model in FIT:
        return FIT[model]
    if not model.startswith("nit-"):
        raise UserError(f"sampling: there is no preset for model {model!r}; there are nit-*, {', '.join(FIT)}")

    def distance(size: tuple[int, int]) -> float:
        return math.hypot(math.log(size[0] / height), math.log(size[1] / width))

    return NIT[min(NIT, key=distance)]
