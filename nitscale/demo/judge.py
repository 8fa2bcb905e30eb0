"""How good the demo's samples are: class agreement by a fixed classifier on pixels, and a Fréchet distance of latents.

Both are printed beside what they are worth: the classifier's accuracy on real pictures, chance, and the distance of
pure noise. Sizes are judged in three groups: trained on, never trained on (up to 1.5 x in side and in ratio), and
beyond, which is shown without a claim.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.folders import ImageFolder, find_images
from nitscale.data.manifest import Dataset
from nitscale.demo.classifier import classify
from nitscale.demo.shapes import CLASSES
from nitscale.evaluate.frechet import frechet_distance, latent_features
from nitscale.evaluate.job import dataset_latents, read_image
from nitscale.flow.sampling import SamplerConfig, SampleRequest
from nitscale.generate.load import TrainedModel
from nitscale.generate.sample import sample_images
from nitscale.layout import Grid
from nitscale.randomness import torch_generator

SIZES: dict[str, list[Grid]] = {
    "trained": [(64, 64), (96, 96), (128, 128), (160, 160), (64, 128), (128, 64), (160, 96), (96, 128)],
    "unseen": [(192, 192), (224, 224), (160, 224), (224, 160), (64, 192), (192, 64)],
    "beyond": [(288, 288), (64, 288)],
}
"""(height, width) in pixels. Trained on: sides of 64 to 160, ratios to 2. Unseen: sides to 224, ratios to 3."""
IMAGES_A_CLASS = {"trained": 5, "unseen": 5, "beyond": 1}
MOST_CLASSES = 16
"""Classes that are sampled, where a user's own photos have more."""
MOST_REAL = 1000
"""Held-out images that are compared with."""
SAMPLER = SamplerConfig(steps=32, guidance=2.5, interval=(0.0, 0.7), token_budget=2048)


@dataclass
class Judgement:
    """What was sampled and how it was judged."""

    classes: list[str]
    step: int
    real: list[tuple[str, Tensor]] = field(default_factory=list)
    """A real picture of each class and its name, for comparison."""
    samples: list[tuple[SampleRequest, Tensor]] = field(default_factory=list)
    groups: dict[str, list[Grid]] = field(default_factory=dict)
    agreement_by_size: dict[Grid, float] = field(default_factory=dict)
    agreement_by_class: dict[str, float] = field(default_factory=dict)
    classifier_on_real: float | None = None
    frechet_samples: float = 0.0
    frechet_noise: float = 0.0
    real_images: int = 0

    def numbers(self) -> dict[str, Any]:
        """What stands in report.json."""
        numbers: dict[str, Any] = {"step": self.step, "classifier_on_real": self.classifier_on_real}
        for group in self.groups:
            numbers[f"agreement_{group}"] = self.agreement(group)
        return numbers | {
            "chance": 1 / len(self.classes),
            "agreement_by_size": {f"{h}x{w}": value for (h, w), value in self.agreement_by_size.items()},
            "agreement_by_class": self.agreement_by_class,
            "frechet_samples": self.frechet_samples,
            "frechet_noise": self.frechet_noise,
            "real_images": self.real_images,
            "samples": len(self.samples),
        }

    def agreement(self, group: str) -> float | None:
        """Mean over the group's sizes; None where the classes are the user's own."""
        values = [self.agreement_by_size[size] for size in self.groups[group] if size in self.agreement_by_size]
        return sum(values) / len(values) if values else None

    def summary(self) -> str:
        """The numbers in a few lines for the terminal."""
        lines = []
        if self.classifier_on_real is not None:
            lines.append(
                f"class agreement (classifier right on {self.classifier_on_real:.1%} of {self.real_images} "
                f"real pictures, chance {1 / len(self.classes):.1%}):"
            )
            for group, sizes in self.groups.items():
                each = ", ".join(f"{h}x{w} {self.agreement_by_size[h, w]:.0%}" for h, w in sizes)
                lines.append(f"  {GROUP_TITLES[group]:<28} {self.agreement(group):6.1%}   ({each})")
        else:
            lines.append("class agreement: not judged, the fixed classifier knows the built-in set only")
        lines.append(
            f"Fréchet distance of latents to {self.real_images} real ones: samples {self.frechet_samples:.2f}, "
            f"noise {self.frechet_noise:.2f}"
        )
        return "\n".join(lines)


GROUP_TITLES = {"trained": "sizes trained on", "unseen": "sizes never trained on", "beyond": "far beyond (no claim)"}


def judge(trained: TrainedModel, heldout: Dataset, pictures: Path | None) -> Judgement:
    """Sample every size and class with guidance, all sizes mixed in packs, and judge the pictures.

    `pictures` is the folder of the built-in set's held-out pictures; None where the classes are the user's own."""
    judgement = Judgement(trained.classes, trained.step)
    judgement.groups = SIZES if pictures is not None else own_sizes(heldout, trained.codec.factor)
    classes = range(min(len(trained.classes), MOST_CLASSES))
    requests = [
        SampleRequest(*size, label, seed)
        for group, sizes in judgement.groups.items()
        for seed in range(IMAGES_A_CLASS[group])
        for size in sizes
        for label in classes
    ]
    latents: dict[int, Tensor] = {}
    images: dict[int, Tensor] = {}
    for position, latent, image in sample_images(trained.model, trained.codec, requests, SAMPLER):
        latents[position], images[position] = latent, image
    judgement.samples = [(request, images[i]) for i, request in enumerate(requests)]

    real_latents = dataset_latents(heldout, MOST_REAL)
    labels = [int(label) for label in heldout.index.label[: len(real_latents)]]
    judgement.real_images = len(real_latents)
    decoded = [trained.codec.decode(z[None].to(trained.device))[0].clamp(-1, 1).cpu() for z in real_latents]
    names = heldout.manifest.classes  # a class with few photos may have none held out
    judgement.real = [(names[y], decoded[labels.index(y)]) for y in range(len(names)) if y in labels][:MOST_CLASSES]
    if pictures is not None:
        judge_classes(judgement, find_images(pictures))

    trained_sizes = set(judgement.groups["trained"])
    comparable = [i for i, r in enumerate(requests) if (r.height, r.width) in trained_sizes]
    noise = [torch.randn(latents[i].shape, generator=torch_generator("demo", "untrained noise", i)) for i in comparable]
    real = latent_features(real_latents)
    judgement.frechet_samples = frechet_distance(latent_features(latents[i] for i in comparable), real)
    judgement.frechet_noise = frechet_distance(latent_features(noise), real)
    return judgement


def judge_classes(judgement: Judgement, real: ImageFolder) -> None:
    """Agreement of the classifier with the class that was asked for, by size and by class, and its accuracy on the
    files of real pictures."""
    assert tuple(judgement.classes) == CLASSES == real.classes
    right_on_real = [classify(read_image(image.path))[0] == image.label for image in real.images]
    judgement.classifier_on_real = sum(right_on_real) / len(right_on_real)
    by_size: dict[Grid, list[bool]] = {}
    by_class: dict[str, list[bool]] = {}
    claimed = {size for group in ("trained", "unseen") for size in judgement.groups[group]}
    for request, image in judgement.samples:
        size = (request.height, request.width)
        right = classify(image)[0] == request.label
        by_size.setdefault(size, []).append(right)
        if size in claimed:
            by_class.setdefault(CLASSES[request.label], []).append(right)
    judgement.agreement_by_size = {size: sum(found) / len(found) for size, found in by_size.items()}
    judgement.agreement_by_class = {name: sum(found) / len(found) for name, found in by_class.items()}


def own_sizes(dataset: Dataset, factor: int) -> dict[str, list[Grid]]:
    """Sizes to sample for the user's own photos: the commonest ones, and others that do not occur."""
    grids = [tuple(int(side) for side in name.split("x")) for name in dataset.manifest.grids]
    counts = list(dataset.manifest.grids.values())
    common = [grids[i] for i in sorted(range(len(grids)), key=lambda i: -counts[i])[:4]]
    rows, columns = common[0]
    others = [(columns, rows), (rows, rows), (rows + 2, columns + 2), (rows, 2 * columns), (2 * rows, columns)]
    unseen = [grid for grid in dict.fromkeys(others) if grid not in grids]
    return {
        "trained": [(r * factor, c * factor) for r, c in common],
        "unseen": [(r * factor, c * factor) for r, c in unseen],
    }
