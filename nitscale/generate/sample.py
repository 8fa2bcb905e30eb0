"""Images on request: any sizes and classes, many in one pack.

A request's noise is keyed by its own seed and size, so that an image does not depend on what it is sampled with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from nitscale.autoencoders import Codec
from nitscale.errors import UserError
from nitscale.flow.guidance import Guidance, GuidedVelocity
from nitscale.flow.samplers import euler, sde
from nitscale.layout import Grid, PackLayout, unpatchify
from nitscale.models.transformer import PackedTransformer
from nitscale.randomness import torch_generator


@dataclass(frozen=True)
class SampleRequest:
    """One image that is wanted."""

    height: int
    """Pixels."""
    width: int
    label: int
    seed: int = 0


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
    model: PackedTransformer, grids: Sequence[Grid], labels: Sequence[int], seeds: Sequence[int], config: SamplerConfig
) -> list[Tensor]:
    """Latents (c, h, w) of images with these grids (tokens), classes and seeds, sampled in one pack."""
    device = next(model.parameters()).device
    layout = PackLayout.from_grids(list(grids), device=device)
    features = model.config.token_features

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
        null_label=model.config.num_classes,
        patch_size=model.config.patch_size,
    )
    if config.sampler == "ode":
        x = euler(velocity, keyed_noise("start"), layout, num_steps=config.steps)
    else:
        x = sde(velocity, keyed_noise("start"), layout, draw=lambda i: keyed_noise("step", i), num_steps=config.steps)
    patch = model.config.patch_size
    return [
        unpatchify(tokens, grid, patch) for tokens, grid in zip(x.float().split(layout.lengths), grids, strict=True)
    ]


def sample_images(
    model: PackedTransformer,
    codec: Codec,
    requests: Sequence[SampleRequest],
    config: SamplerConfig,
    progress: bool = True,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(position of the request, latent (c, h, w), image (3, H, W) in [-1, 1] on the CPU), as packs are finished."""
    multiple = codec.factor * model.config.patch_size
    for request in requests:
        check_request(request, multiple, model.config.num_classes, config.token_budget)
    with tqdm(total=len(requests), desc="sample", unit="image", disable=not progress) as bar:
        for pack in packs_of_requests(requests, multiple, config.token_budget):
            chosen = [requests[i] for i in pack]
            latents = sample_latents(
                model,
                [(r.height // multiple, r.width // multiple) for r in chosen],
                [r.label for r in chosen],
                [r.seed for r in chosen],
                config,
            )
            for position, latent in zip(pack, latents, strict=True):
                if not torch.isfinite(latent).all():
                    raise UserError("sample: the model gave values that are not finite; its weights are broken")
                image = codec.decode(latent[None])[0].clamp(-1, 1).float().cpu()
                yield position, latent.cpu(), image
                bar.update()


def check_request(request: SampleRequest, multiple: int, num_classes: int, token_budget: int) -> None:
    """UserError for a size or class that cannot be sampled."""
    size = f"{request.height}x{request.width}"
    if request.height < 1 or request.width < 1 or request.height % multiple or request.width % multiple:
        height, width = (max(round(side / multiple), 1) * multiple for side in (request.height, request.width))
        raise UserError(
            f"sample: size {size} must be multiples of {multiple} pixels (codec factor x patch size), "
            f"e.g. {height}x{width}"
        )
    tokens = (request.height // multiple) * (request.width // multiple)
    if 2 * tokens > token_budget:
        raise UserError(
            f"sample: size {size} needs {2 * tokens:,} tokens with guidance, more than token_budget={token_budget:,}; "
            f"use --token-budget {2 * tokens}"
        )
    if not 0 <= request.label < num_classes:
        raise UserError(f"sample: class {request.label} is not among 0 to {num_classes - 1}")


def packs_of_requests(requests: Sequence[SampleRequest], multiple: int, token_budget: int) -> Iterator[list[int]]:
    """Positions of requests, in order, cut where the next would exceed the budget."""
    pack: list[int] = []
    used = 0
    for position, request in enumerate(requests):
        tokens = 2 * (request.height // multiple) * (request.width // multiple)
        if pack and used + tokens > token_budget:
            yield pack
            pack, used = [], 0
        pack.append(position)
        used += tokens
    if pack:
        yield pack
