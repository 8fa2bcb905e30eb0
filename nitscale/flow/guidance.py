"""Guidance of a sampler: a model, labels and a layout in, a callable velocity(x (N, F), t (n,)) → (N, F) out.

Classifier-free guidance (arXiv 2207.12598) within an interval of times (arXiv 2404.07724): v = v_null + s · (v_class -
v_null). Both halves are evaluated in one pack, and only for the images that are guided at this time; every image of a
pack may have guidance of its own. With a weak model, its velocity takes the place of v_null (autoguidance,
arXiv 2406.02507).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.layout import PackLayout


class Model(Protocol):
    def __call__(self, tokens: Tensor, t: Tensor, labels: Tensor, layout: PackLayout) -> Tensor: ...


class Velocity(Protocol):
    """What samplers integrate."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Guidance:
    """How strongly, and when, an image is guided."""

    scale: float = 1.0
    """s; 1 is no guidance."""
    interval: tuple[float, float] = (0.0, math.inf)
    """Times (low, high), both included, between which the image is guided; 0 = data. A solver that looks beyond the
    data is taken to be at it."""
    channels: int | None = None
    """Guide only the first so many latent channels (3 of 4 in the published FiT code); all if not given."""
    power: float = 0.0
    """Exponent of the power-cosine schedule, 1 + (s - 1) · (1 - cos(π t^power)) / 2 (arXiv 2303.14389); 0: constant."""
    interval_at: str = "step"
    """Where a solver with several evaluations a step judges the interval. step: at the step's beginning, as the
    published NiT code; evaluation: at each evaluation's own time."""
    weak_labels: str = "same"
    """What a weak model is asked for. same: the image's class; null: the null class, as the published NiT code."""

    def __post_init__(self) -> None:
        if self.interval_at not in ("step", "evaluation"):
            raise UserError(f"guidance: interval_at={self.interval_at!r} is unknown; choose step or evaluation")
        if self.weak_labels not in ("same", "null"):
            raise UserError(f"guidance: weak_labels={self.weak_labels!r} is unknown; choose same or null")

    def scale_at(self, t: float) -> float:
        if self.power == 0.0:
            return self.scale
        return 1 + (self.scale - 1) * (1 - math.cos(math.pi * min(max(t, 0.0), 1.0) ** self.power)) / 2

    def is_active(self, t: float) -> bool:
        return self.scale != 1.0 and self.interval[0] <= max(t, 0.0) <= self.interval[1]


class GuidedVelocity:
    """The velocity of `model` for these labels and layout, guided. `guidance` is one for all images, or one for each.

    `null_label` is the model's null class (num_classes); `patch_size` is needed where only some channels are guided.
    """

    def __init__(
        self,
        model: Model,
        labels: Tensor,
        layout: PackLayout,
        guidance: Guidance | Sequence[Guidance] = Guidance(),
        *,
        null_label: int,
        patch_size: int = 1,
        weak_model: Model | None = None,
    ) -> None:
        self.model, self.weak_model = model, weak_model
        self.labels, self.layout, self.patch_size = labels, layout, patch_size
        self.null_label = null_label
        each = [guidance] * layout.num_segments if isinstance(guidance, Guidance) else list(guidance)
        if len(each) != layout.num_segments:
            raise UserError(f"guidance: {len(each)} given for {layout.num_segments} images; give one, or one for each")
        self.guidance = each
        self._subpacks: dict[tuple[int, ...], tuple[Tensor, PackLayout, PackLayout]] = {}

    def __call__(self, x: Tensor, t: Tensor, step_t: Tensor | None = None) -> Tensor:
        """The guided velocity at x (N, F) and t (n,). `step_t` is the time at which the solver's step began."""
        times = t.tolist()
        begun = times if step_t is None else step_t.tolist()
        active = tuple(
            image
            for image, guidance in enumerate(self.guidance)
            if guidance.is_active((begun if guidance.interval_at == "step" else times)[image])
        )
        if not active:
            return self.model(x, t, self.labels, self.layout)
        images = torch.tensor(active, device=x.device)
        tokens, sub_layout, both = self._subpack(active)
        null = torch.full_like(self.labels[images], self.null_label)
        if self.weak_model is None:
            velocity = self.model(
                torch.cat([x, x[tokens]]), torch.cat([t, t[images]]), torch.cat([self.labels, null]), both
            )
            velocity, reference = velocity.split([len(x), len(tokens)])
        else:
            ask_null = torch.tensor([self.guidance[image].weak_labels == "null" for image in active], device=x.device)
            labels = torch.where(ask_null, null, self.labels[images])
            velocity = self.model(x, t, self.labels, self.layout)
            reference = self.weak_model(x[tokens], t[images], labels, sub_layout)

        conditional = velocity[tokens]
        scales = [self.guidance[image].scale_at(times[image]) for image in active]
        scale = torch.tensor(scales, dtype=torch.float64, device=x.device)[sub_layout.segment_ids][:, None]
        mixed = reference + scale.to(conditional.dtype) * (conditional - reference)
        mixed = torch.where(self._guided_features(active, sub_layout, mixed), mixed, conditional)
        return velocity.index_copy(0, tokens, mixed)

    def _subpack(self, active: tuple[int, ...]) -> tuple[Tensor, PackLayout, PackLayout]:
        """The tokens of these images, their layout, and the layout of the whole pack followed by them."""
        if active not in self._subpacks:
            device = self.layout.segment_ids.device
            grids = [tuple(grid) for grid in self.layout.grids.tolist()]
            sub_grids = [grids[image] for image in active]
            starts = self.layout.cu_seqlens.tolist()
            tokens = torch.cat([torch.arange(starts[image], starts[image + 1]) for image in active]).to(device)
            sub_layout = PackLayout.from_grids(sub_grids, device)
            self._subpacks[active] = tokens, sub_layout, PackLayout.from_grids(grids + sub_grids, device)
        return self._subpacks[active]

    def _guided_features(self, active: tuple[int, ...], sub_layout: PackLayout, guided: Tensor) -> Tensor:
        """(tokens, F) bool: the features of the guided channels, which come first in the order (c p1 p2)."""
        features = guided.shape[1]
        limits = [
            features if channels is None else channels * self.patch_size**2
            for channels in (self.guidance[image].channels for image in active)
        ]
        limit = torch.tensor(limits, device=guided.device)[sub_layout.segment_ids]
        return torch.arange(features, device=guided.device) < limit[:, None]
