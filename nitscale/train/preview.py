"""Previews: a sheet of samples at fixed seeds while a run trains, as PNG in `previews/` and in TensorBoard.

The seeds, sizes and classes never change within a run, so that the sheets of its steps show one and the same picture
become clearer. Every rank samples all of it, because under ZeRO 3 and tensor parallelism the model needs them all; the
first one decodes and draws.
"""

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from nitscale.autoencoders import Codec, codec_from_spec
from nitscale.data.manifest import Manifest
from nitscale.errors import UserError
from nitscale.flow.guidance import Model
from nitscale.flow.sampling import (
    SamplerConfig,
    SampleRequest,
    check_request,
    guided_tokens,
    packs_of_requests,
    sample_latents,
)
from nitscale.layout import Grid
from nitscale.models.transformer import ModelConfig
from nitscale.pictures import Row, contact_sheet, save_png
from nitscale.train.process import Process

MOST_SIZES = 4
MOST_CLASSES = 8
BRIGHTEST = 3.0
"""Standard deviations of a latent channel that are shown as white, where a codec is missing."""


@dataclass(frozen=True)
class PreviewConfig:
    """Samples while training."""

    every: int = 0
    """Steps between previews; 0: none."""
    sizes: tuple[Grid, ...] = ()
    """[height, width] in pixels; the training set's four most frequent ones if not given."""
    classes: tuple[int, ...] = ()
    """Numbers of classes; the first eight if not given."""
    seeds: tuple[int, ...] = (0,)
    """Pictures of each class."""
    sampling: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must not be negative, got {self.every}")


class Previewer:
    """The previews of a run."""

    def __init__(
        self, config: PreviewConfig, manifest: Manifest, model: ModelConfig, process: Process, run: Path
    ) -> None:
        """`manifest`: of the training set, for its sizes, classes and codec. UserError for a size or class that cannot
        be sampled. A codec that cannot be loaded here is none: the first latent channels are shown instead."""
        self.model, self.manifest, self.process, self.run = model, manifest, process, run
        self.multiple = manifest.factor * model.patch_size
        sizes = config.sizes or common_sizes(manifest, self.multiple)
        classes = config.classes or range(min(len(manifest.classes), MOST_CLASSES))
        self.requests = [SampleRequest(h, w, label, s) for (h, w), s, label in product(sizes, config.seeds, classes)]
        for request in self.requests:
            check_request(request, self.multiple, len(manifest.classes), "preview")
        budget = max(config.sampling.token_budget, *(guided_tokens(r, self.multiple) for r in self.requests))
        self.sampling = replace(config.sampling, token_budget=budget)
        if not model.null_class:
            self.sampling = replace(self.sampling, guidance=1.0)
        self.codec: Codec | None = None
        if process.is_main:
            try:
                self.codec = codec_from_spec(manifest.codec)
            except UserError as error:
                print(f"preview: latent channels are shown instead of pictures: {error}", flush=True)

    def draw(self, step: int, forward: Model) -> Image | None:
        """The sheet of `step`, which is also written to the run folder, on rank 0; None on the others. All ranks must
        call it; `forward` is the model's velocity. UserError, on all, if the sheet cannot be written."""
        latents = self.sample(forward)
        sheet = None
        with self.process.together(f"draw the preview of step {step}"):
            if self.process.is_main:
                sheet = contact_sheet(self.rows(latents))
                save_png(sheet, self.run / "previews" / f"step-{step:08d}.png", {"step": step})
        return sheet

    def sample(self, forward: Model) -> list[Tensor]:
        """The latent (c, h, w) of each request."""
        latents: list[Tensor] = []
        for pack in packs_of_requests(self.requests, self.multiple, self.sampling.token_budget):
            chosen = [self.requests[position] for position in pack]
            latents += sample_latents(
                forward,
                [request.grid(self.multiple) for request in chosen],
                [request.label for request in chosen],
                [request.seed for request in chosen],
                self.sampling,
                channels=self.model.in_channels,
                null_label=self.model.num_classes,
                patch_size=self.model.patch_size,
                device=self.process.device,
            )
        return latents

    def rows(self, latents: list[Tensor]) -> list[Row]:
        """Pictures of the latents, one row for each size."""
        if self.codec is not None:
            self.codec.to(self.process.device)
        pictures: dict[Grid, list[tuple[Tensor, str]]] = {}
        for request, latent in zip(self.requests, latents, strict=True):
            finite = latent.isfinite().all()
            picture = self.picture(latent if finite else torch.zeros_like(latent)).clamp(-1, 1).float().cpu()
            name = f"{self.manifest.classes[request.label]} #{request.seed}"
            caption = name if finite else f"{name}: not finite"
            pictures.setdefault((request.height, request.width), []).append((picture, caption))
        if self.codec is not None:
            self.codec.to("cpu")  # training needs the memory
        return [Row(f"{height} x {width}", *zip(*row, strict=True)) for (height, width), row in pictures.items()]

    def picture(self, latent: Tensor) -> Tensor:
        """(c, h, w) → (3, H, W) in [-1, 1]: decoded, or three latent channels."""
        if self.codec is not None:
            return self.codec.decode(latent[None])[0]
        channels = latent[:3] if len(latent) >= 3 else latent[:1].expand(3, -1, -1)
        factor = self.manifest.factor
        return channels.repeat_interleave(factor, 1).repeat_interleave(factor, 2) / BRIGHTEST


def common_sizes(manifest: Manifest, multiple: int) -> list[Grid]:
    """The most frequent sizes of a dataset in pixels that are multiples of `multiple`."""
    sizes = {}
    for name, count in manifest.grids.items():
        rows, columns = (int(cells) * manifest.factor for cells in name.split("x"))
        if rows % multiple == 0 and columns % multiple == 0:
            sizes[rows, columns] = count
    return sorted(sizes, key=lambda size: (-sizes[size], size))[:MOST_SIZES]
