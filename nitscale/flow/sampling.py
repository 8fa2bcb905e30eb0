"""Wishes → latents: images of any sizes and classes, many in one pack, by a model that is a callable.

A request's noise is keyed by its own seed and size, so that an image does not depend on what it is sampled with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.flow.guidance import Guidance, GuidedVelocity, Model
from nitscale.flow.samplers import euler, sde
from nitscale.layout import Grid, PackLayout, unpatchify
from nitscale.randomness import torch_generator


@dataclass(frozen=True)
class SampleRequest:
    """One image that is wanted."""

    height: int
    """Pixels."""
    width: int
    label: int
    seed: int = 0

    def grid(self, multiple: int) -> Grid:
        """Tokens, of `multiple` pixels a side."""
        return self.height // multiple, self.width // multiple


@dataclass(frozen=True)
class SamplerConfig:
    """How requests become latents."""

    sampler: Literal["ode", "sde"] = "ode"
    """ode: Euler steps of the flow; sde: Euler-Maruyama with a last step to the mean (NiT's choices)."""
    steps: int = 50
    guidance: float = 2.5
    """Scale of classifier-free guidance; 1 does without."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times at which guidance is on; 0 is data, 1 is noise."""
    token_budget: int = 4096
    """Most tokens sampled at once, conditional and unconditional halves counted together."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"interval must be two times 0 <= from <= to <= 1, got {self.interval}")


@torch.no_grad()
def sample_latents(
    model: Model,
    grids: Sequence[Grid],
    labels: Sequence[int],
    seeds: Sequence[int],
    config: SamplerConfig,
    *,
    channels: int,
    null_label: int,
    patch_size: int = 1,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Latents (channels, h, w) of images with these grids (tokens), classes and seeds, sampled in one pack.

    The model is called the same number of times whatever it answers, so that ranks that share it stay together.
    """
    layout = PackLayout.from_grids(list(grids), device=device)
    features = channels * patch_size**2

    def keyed_noise(*key: str | int) -> Tensor:
        """(N, F): each image's part depends on its own seed and grid alone."""
        return torch.cat(
            [
                torch.randn(rows * columns, features, generator=torch_generator("sample", seed, rows, columns, *key))
                for (rows, columns), seed in zip(grids, seeds, strict=True)
            ]
        ).to(device)

    velocity = GuidedVelocity(
        model,
        torch.tensor(list(labels), device=device),
        layout,
        Guidance(config.guidance, config.interval),
        null_label=null_label,
        patch_size=patch_size,
    )
    if config.sampler == "ode":
        x = euler(velocity, keyed_noise("start"), layout, num_steps=config.steps)
    else:
        x = sde(velocity, keyed_noise("start"), layout, draw=lambda i: keyed_noise("step", i), num_steps=config.steps)
    return [
        unpatchify(tokens, grid, patch_size)
        for tokens, grid in zip(x.float().split(layout.lengths), grids, strict=True)
    ]


def check_request(request: SampleRequest, multiple: int, num_classes: int, who: str = "sample") -> None:
    """UserError, from `who`, for a size or class that cannot be sampled."""
    size = f"{request.height}x{request.width}"
    if request.height < 1 or request.width < 1 or request.height % multiple or request.width % multiple:
        height, width = (max(round(side / multiple), 1) * multiple for side in (request.height, request.width))
        raise UserError(
            f"{who}: size {size} must be multiples of {multiple} pixels (codec factor x patch size), "
            f"e.g. {height}x{width}"
        )
    if not 0 <= request.label < num_classes:
        raise UserError(f"{who}: class {request.label} is not among 0 to {num_classes - 1}")


def packs_of_requests(requests: Sequence[SampleRequest], multiple: int, token_budget: int) -> Iterator[list[int]]:
    """Positions of requests, in order, cut where the next would exceed the budget."""
    pack: list[int] = []
    used = 0
    for position, request in enumerate(requests):
        tokens = guided_tokens(request, multiple)
        if pack and used + tokens > token_budget:
            yield pack
            pack, used = [], 0
        pack.append(position)
        used += tokens
    if pack:
        yield pack


def guided_tokens(request: SampleRequest, multiple: int) -> int:
    """Tokens of a request's conditional and unconditional halves together."""
    rows, columns = request.grid(multiple)
    return 2 * rows * columns
