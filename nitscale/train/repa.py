"""Losses beside the velocity's: representation alignment (REPA, arXiv 2410.06940) and direction.

REPA pulls the projected features of a block towards those of a frozen vision encoder, for each token its cell of the
image: 1 - cosine. The encoder sees the clean pixels that the latent was made of, mirrored as the latent is; or its
features were made before and come with the data. The directional loss is 1 - cosine between predicted and true
velocity. Both are normalised as the velocity's loss, so that packs and ranks add up to the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nitscale.data.loader import check_members, feature_width
from nitscale.data.manifest import Dataset
from nitscale.encoders import Encoder, load_encoder
from nitscale.errors import UserError
from nitscale.flow.losses import alignment_error, direction_error, reduce_tokens
from nitscale.layout import PackedBatch
from nitscale.models.attention import attend
from nitscale.models.transformer import ModelConfig

PRECOMPUTED = "precomputed"


@dataclass(frozen=True)
class RepaConfig:
    """The published NiT: RADIO-v2.5-H, weight 1.0, block 8 (of XL), directional_weight 1.0."""

    encoder: str | None = None
    """Whose features the model's are aligned with: a local folder or hub id of a DINOv2 or RADIO, such as
    facebook/dinov2-base; or precomputed, those that come with the data. None: there is no alignment loss."""
    weight: float = 1.0
    """Of the alignment loss, beside the velocity's."""
    block: int = 8
    """The model's features are taken after this many blocks."""
    projector_width: int = 2048
    """Hidden features of the projector between the two."""
    oversample: int = 1
    """Patches of the encoder a side of one token, whose features are averaged. With 1 the encoder sees an image of as
    many patches as there are tokens: small ones, if a token stands for 32 pixels."""
    trust_remote_code: bool = False
    """Run the Python code that an encoder brings along (older RADIOs do): it can do all that your account may."""
    directional_weight: float = 0.0
    """Of the directional loss, beside the velocity's."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.directional_weight < 0:
            raise ValueError("weight and directional_weight must not be negative")
        for name in ("block", "projector_width", "oversample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.encoder == PRECOMPUTED and self.oversample != 1:
            raise ValueError(f"oversample={self.oversample} has no effect on features that are {PRECOMPUTED}")


@dataclass(frozen=True)
class Repa:
    """What a run needs for these losses. Made by `prepare_repa`."""

    config: RepaConfig
    model: ModelConfig
    """The model to train: with the projector, if there is an alignment loss."""
    token_pixels: int
    """Pixels of a token's side."""
    encoder: Encoder | None

    @property
    def aligns(self) -> bool:
        """Whether the model must return its features."""
        return self.config.encoder is not None

    @property
    def members(self) -> Sequence[str]:
        """Optional members of a sample that the loader must read."""
        return members_for(self.config)

    def losses(
        self,
        batch: PackedBatch,
        prediction: Tensor,
        velocity: Tensor,
        projected: Tensor | None,
        total: float,
        per: str = "token",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This pack's share of the weighted losses, and of each loss by itself, for the log: 0-dim, without gradient,
        on the device; over all packs of a step they add up to the mean of 1 - cosine.

        `prediction` and `velocity` (N, F); `projected` (N, Z), the model's features if it `aligns`; `batch` is on the
        model's device; `total` and `per` as in `nitscale.flow.losses`.
        """
        errors: dict[str, tuple[float, Tensor]] = {}
        if self.aligns:
            assert projected is not None
            error = alignment_error(projected.float(), self.features(batch).float())
            errors["repa"] = (self.config.weight, error)
        if self.config.directional_weight:
            errors["directional"] = (self.config.directional_weight, direction_error(prediction, velocity))
        loss, shares = prediction.new_zeros(()), {}
        for name, (weight, error) in errors.items():
            share = reduce_tokens(error, batch.layout, batch.weights, total, per)
            loss, shares[name] = loss + weight * share, share.detach()
        return loss, shares

    def features(self, batch: PackedBatch) -> Tensor:
        """The encoder's features of each token, (N, Z)."""
        if self.encoder is None:
            assert batch.features is not None
            return batch.features
        assert batch.images is not None
        grids = [(height // self.token_pixels, width // self.token_pixels) for height, width in batch.images.sizes]
        return self.encoder.features(batch.images.split(), grids)


def prepare_repa(
    config: RepaConfig, model: ModelConfig, dataset: Dataset, device: torch.device | str, precision: str = "fp32"
) -> Repa:
    """Load the encoder, and give the model a projector to its features.

    UserError if the encoder cannot be had, the dataset lacks what it needs, or `model` has another projector already.
    """
    token_pixels = dataset.manifest.factor * model.patch_size
    if config.encoder is None:
        return Repa(config, model, token_pixels, None)
    check_members(dataset, model.patch_size, members_for(config))
    encoder = None
    if config.encoder != PRECOMPUTED:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        encoder = load_encoder(
            config.encoder, attend, device, dtype, config.oversample, trust_remote_code=config.trust_remote_code
        )
    width = encoder.width if encoder is not None else feature_width(dataset, model.patch_size)
    wanted: dict[str, Any] = {
        "feature_block": config.block,
        "projector_width": config.projector_width,
        "feature_width": width,
    }
    for name, value in wanted.items():
        if getattr(model, name) not in (None, value):
            raise UserError(
                f"repa: model.{name}={getattr(model, name)}, but the repa section makes it {value}; leave model.{name} "
                "out, or make the two agree"
            )
    return Repa(config, replace(model, **wanted), token_pixels, encoder)


def members_for(config: RepaConfig) -> Sequence[str]:
    if config.encoder is None:
        return ()
    return ("features",) if config.encoder == PRECOMPUTED else ("image",)
