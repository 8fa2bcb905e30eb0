"""Validation: the loss on held-out images at fixed times and noise, in bands of time and by size of image.

Each image meets one time in each band, and noise that only (seed, image, band) decide. So two checkpoints, or two runs,
are compared on the very same questions, and nearly all of the noise that makes a training loss flicker cancels. Times
are spread evenly over a band, whatever law training draws from: the mean over bands is the loss of uniform times.
"""

import heapq
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nitscale.data.loader import read_pack
from nitscale.data.manifest import Dataset, Manifest
from nitscale.data.plan import Pack
from nitscale.errors import UserError
from nitscale.flow.guidance import Model
from nitscale.flow.losses import squared_error
from nitscale.flow.paths import interpolate
from nitscale.layout import PackedBatch
from nitscale.models.transformer import ModelConfig
from nitscale.randomness import permutation, torch_generator
from nitscale.train.process import Process


@dataclass(frozen=True)
class ValidationConfig:
    """The loss on held-out images."""

    path: str | None = None
    """Prefix of a dataset of images that are not trained on, encoded by the same codec. Without one: no validation."""
    every: int = 1000
    """Steps between validations."""
    images: int = 2048
    """Most images; which ones, the run's seed decides."""
    bands: int = 8
    """Equal parts of the time from data (0) to noise (1). Every image is asked once in each: costs as many passes."""
    token_budget: int | None = None
    """Most tokens of a pack; data.token_budget if not given."""

    def __post_init__(self) -> None:
        for name in ("every", "images", "bands"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Validator:
    """The held-out images of a run, dealt to its data ranks."""

    def __init__(
        self,
        config: ValidationConfig,
        dataset: Dataset,
        train_manifest: Manifest,
        model: ModelConfig,
        process: Process,
        *,
        seed: int,
        token_budget: int,
        weighting: str = "token",
    ) -> None:
        """`weighting`: whether every "token" or every "image" counts alike, as in training. UserError if the held-out
        images do not fit the model, are not from the training set's codec, or have classes that it does not have."""
        check_codec(config, dataset.manifest, train_manifest)
        self.config, self.dataset, self.model, self.process = config, dataset, model, process
        self.seed, self.weighting = seed, weighting
        self.labels = torch.tensor(matching_labels(config, dataset.manifest, train_manifest))
        """Of the held-out set's classes, by their names, in the training set's numbering."""
        chosen = np.sort(permutation(dataset.index.num_samples, seed, "validation")[: config.images])
        grids = np.stack([dataset.index.rows[chosen], dataset.index.columns[chosen]], axis=1).astype(np.int64)
        if (grids % model.patch_size).any():
            raise UserError(
                f"validation: {config.path} has latents whose sides are no multiples of model.patch_size="
                f"{model.patch_size}; encode them with encode.patch_size={model.patch_size}"
            )
        grids //= model.patch_size
        lengths = grids.prod(axis=1)
        budget = config.token_budget or token_budget
        if lengths.max() > budget:
            raise UserError(
                f"validation: {config.path} has an image of {lengths.max():,} tokens, more than the token budget of "
                f"{budget:,}; set validation.token_budget={lengths.max()}, or encode with a lower encode.max_tokens"
            )
        self.buckets = np.unique(size_buckets(lengths))
        packs = deal(lengths, process.data_size, budget)
        self.batches = [self.read(chosen, grids, pack) for pack in packs[process.data_rank :: process.data_size]]
        """This rank's packs, kept in host memory: as many as every other rank has."""

    def read(self, chosen: np.ndarray, grids: np.ndarray, positions: np.ndarray) -> PackedBatch:
        """The images at these positions of the chosen ones, not mirrored; an empty pack is one image of weight 0."""
        weight = 1.0 if len(positions) else 0.0
        positions = positions if len(positions) else np.zeros(1, np.int64)
        pack = Pack(0, 0, chosen[positions], grids[positions], np.zeros(len(positions), bool), noise_key=0)
        batch = read_pack(self.dataset, pack, self.model.patch_size)
        return replace(batch, labels=self.labels[batch.labels], weights=batch.weights * weight)

    @torch.no_grad()
    def run(self, forward: Model) -> dict[str, float]:
        """The losses of the model, and how many images they are of; `forward` is its velocity. All ranks must call it:
        all call `forward` the same number of times and get the same result, which does not depend on their number."""
        device, bands = self.process.device, self.config.bands
        sums = torch.zeros(3, bands, len(self.buckets), dtype=torch.float64, device=device)
        for host_batch in self.batches:
            buckets = np.searchsorted(self.buckets, size_buckets(np.array(host_batch.layout.lengths)))
            bucket, batch = torch.from_numpy(buckets).to(device), host_batch.to(device)
            counted = batch.weights.double()
            weights = counted * batch.layout.grids.prod(1) if self.weighting == "token" else counted
            for band in range(bands):
                errors = self.errors_of_images(forward, batch, band)
                for kind, values in enumerate((errors * weights, weights, counted)):
                    sums[kind, band].index_add_(0, bucket, values)
        if self.process.data_size > 1:
            dist.all_reduce(sums, group=self.process.data_group)
        return self.describe(sums.cpu())

    def errors_of_images(self, forward: Model, batch: PackedBatch, band: int) -> Tensor:
        """(n,) float64: the squared velocity error of each image of a pack, the mean over its tokens, at its time in
        the band."""
        times, noise = [], []
        for sample_id, length in zip(batch.sample_ids, batch.layout.lengths, strict=True):
            # On the host: the same numbers on every kind of device.
            generator = torch_generator(self.seed, "validation", sample_id, band)
            times.append(torch.rand((), generator=generator, dtype=torch.float64))
            noise.append(torch.randn(length, batch.tokens.shape[1], generator=generator))
        device, layout = batch.tokens.device, batch.layout
        t = ((torch.stack(times) + band) / self.config.bands).to(device, torch.float32)
        noisy, velocity = interpolate(batch.tokens.float(), torch.cat(noise).to(device), t, layout)
        errors = squared_error(forward(noisy, t, batch.labels, layout), velocity).double()
        summed = torch.zeros(layout.num_segments, dtype=torch.float64, device=device)
        return summed.index_add_(0, layout.segment_ids, errors) / layout.grids.prod(1)

    def describe(self, sums: Tensor) -> dict[str, float]:
        """Means of the summed errors, weights and numbers of images, (3, bands, buckets)."""
        bands = self.config.bands
        parts = {"loss": sums.sum((1, 2))}
        parts |= {f"loss_t_{i / bands:.3g}-{(i + 1) / bands:.3g}": sums[:, i].sum(1) for i in range(bands)}
        parts |= {f"loss_tokens_{bucket_name(k)}": sums[:, :, i].sum(1) for i, k in enumerate(self.buckets.tolist())}
        losses = {name: float(error / weight) for name, (error, weight, _) in parts.items() if weight > 0}
        return losses | {"images": float(sums[2].sum() / bands)}


def deal(lengths: np.ndarray, ranks: int, token_budget: int) -> list[np.ndarray]:
    """Positions of images, (n,) int64, in packs of about the same number of tokens and at most `token_budget`: as few
    rounds of `ranks` packs as will do. Packs may be empty."""
    rounds = max(1, ceil(lengths.sum() / (token_budget * ranks)))
    while True:
        packs: list[list[int]] = [[] for _ in range(rounds * ranks)]
        heap = [(0, pack) for pack in range(len(packs))]
        for image in np.argsort(-lengths, kind="stable").tolist():  # the longest first, each to the lightest pack
            tokens, pack = heap[0]
            packs[pack].append(image)
            heapq.heapreplace(heap, (tokens + int(lengths[image]), pack))
        if max(tokens for tokens, _ in heap) <= token_budget:
            return [np.array(pack, np.int64) for pack in packs]
        rounds += 1


def size_buckets(lengths: np.ndarray) -> np.ndarray:
    """(n,) int64: k for images of 2^(k-1) + 1 to 2^k tokens."""
    return np.array([(int(length) - 1).bit_length() for length in lengths], np.int64)


def bucket_name(bucket: int) -> str:
    """The numbers of tokens in a bucket, such as 129-256."""
    low, high = (1 << bucket) // 2 + 1, 1 << bucket
    return f"{low}-{high}" if low < high else str(high)


def check_codec(config: ValidationConfig, heldout: Manifest, train: Manifest) -> None:
    """UserError unless both sets' latents mean the same."""
    identity = ("id", "channels", "factor", "digest")
    if names := [name for name in identity if heldout.codec.get(name) != train.codec.get(name)]:
        raise UserError(
            f"validation: the latents of {config.path} are not from the codec of the training set: it differs in "
            f"{', '.join(names)}; encode the held-out images with the codec that the training images were encoded with"
        )


def matching_labels(config: ValidationConfig, heldout: Manifest, train: Manifest) -> list[int]:
    """The training set's number of each class of the held-out set. UserError if it does not have one of the name."""
    numbers = {name: number for number, name in reversed(list(enumerate(train.classes)))}
    if unknown := [name for name in heldout.classes if name not in numbers]:
        raise UserError(
            f"validation: {config.path} has {len(unknown)} classes that the training set does not have, such as "
            f"{unknown[0]!r}; encode the held-out images with the same names of classes"
        )
    return [numbers[name] for name in heldout.classes]
