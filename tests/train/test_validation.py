"""The validation loss: the same whatever the ranks and packs, right, and comparable between evaluations."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nitscale.data.manifest import Dataset, load_dataset
from nitscale.errors import UserError
from nitscale.layout import PackLayout
from nitscale.models.transformer import ModelConfig
from nitscale.train.process import Process
from nitscale.train.validation import ValidationConfig, Validator, bucket_name, deal, size_buckets
from tests.models.tiny import NIT, random_model

OPTIONS = {**NIT, "in_channels": 32, "num_classes": 8}
MODEL = ModelConfig(**OPTIONS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(shapes_dataset: Path) -> Dataset:
    return load_dataset(shapes_dataset)


def validator(dataset: Dataset, rank: int = 0, ranks: int = 1, budget: int = 64, **options: object) -> Validator:
    settings = ValidationConfig(**({"path": "heldout", "images": 24, "bands": 4} | options))
    process = Process(rank, ranks, CPU)
    return Validator(settings, dataset, dataset.manifest, MODEL, process, seed=5, token_budget=budget)


def run_on_ranks(dataset: Dataset, ranks: int, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[dict]:
    """The result on each of several ranks, one after the other in this process, and their numbers of passes."""
    model = random_model(OPTIONS)
    passes = Counter()
    parts: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: parts.append(tensor.clone()))
    held = [validator(dataset, rank, ranks, **options) for rank in range(ranks)]
    for rank, one in enumerate(held):

        def forward(*arguments: object, rank: int = rank) -> Tensor:
            passes[rank] += 1
            return model(*arguments)

        one.run(forward)
    assert len(set(passes.values())) == 1 and len(passes) == ranks
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.copy_(sum(parts)))
    return [one.run(model) for one in held]


def close(a: dict[str, float], b: dict[str, float]) -> bool:
    return a.keys() == b.keys() and all(abs(a[name] - b[name]) <= 1e-6 * abs(b[name]) for name in a)


@pytest.mark.parametrize("ranks", [2, 3, 30])
def test_the_loss_does_not_depend_on_the_number_of_ranks(
    dataset: Dataset, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = validator(dataset).run(random_model(OPTIONS))
    for result in run_on_ranks(dataset, ranks, monkeypatch):  # 30 ranks for 24 images: some have nothing
        assert close(result, alone)


def test_the_loss_does_not_depend_on_the_packs(dataset: Dataset) -> None:
    model = random_model(OPTIONS)
    small, large = validator(dataset, budget=25), validator(dataset, budget=4096)
    assert len(small.batches) > 3 * len(large.batches)
    assert close(small.run(model), large.run(model))
    assert small.run(model) == small.run(model)


@pytest.mark.parametrize("weighting", ["token", "image"])
def test_bands_and_buckets_are_means_of_the_right_images(dataset: Dataset, weighting: str) -> None:
    """A model whose error is known: 0.5 at early times and 0 at late ones, plus the number of tokens."""
    held = validator(dataset)
    held.weighting = weighting
    asked: list[tuple[float, int]] = []

    def errors_of_images(forward: object, batch: object, band: int) -> Tensor:
        lengths = torch.tensor(batch.layout.lengths, dtype=torch.float64)
        asked.extend((band, int(length)) for length in lengths)
        return lengths + (0.5 if band < 2 else 0.0)

    held.errors_of_images = errors_of_images
    result = held.run(random_model(OPTIONS))
    lengths = np.array([length for band, length in asked if band == 0])
    assert len(lengths) == result["images"] == 24
    weights = lengths if weighting == "token" else np.ones(24)
    mean = np.average(lengths, weights=weights)
    assert result["loss"] == pytest.approx(mean + 0.25)
    assert result["loss_t_0-0.25"] == pytest.approx(mean + 0.5) and result["loss_t_0.75-1"] == pytest.approx(mean)
    for bucket in np.unique(size_buckets(lengths)):
        own = size_buckets(lengths) == bucket
        expected = np.average(lengths[own], weights=weights[own]) + 0.25
        assert result[f"loss_tokens_{bucket_name(bucket)}"] == pytest.approx(expected)


def test_the_error_is_that_of_a_plain_loop_over_images(dataset: Dataset) -> None:
    """A model that always answers zero: its error is the mean square of the velocity, noise - data."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def zero(tokens: Tensor, t: Tensor, labels: Tensor, layout: PackLayout) -> Tensor:
        seen.extend(zip(tokens.split(layout.lengths), t, labels, strict=True))
        return torch.zeros_like(tokens)

    held = validator(dataset, budget=4096, images=3, bands=1)
    result = held.run(zero)
    (batch,) = held.batches
    data = batch.tokens.float().split(batch.layout.lengths)
    velocities = [((noisy - (1 - t) * x) / t - x) for (noisy, t, _), x in zip(seen, data, strict=True)]
    assert result["loss"] == pytest.approx(float(torch.cat(velocities).square().mean()), rel=1e-5)
    assert [int(label) for _, _, label in seen] == dataset.index.label[list(batch.sample_ids)].tolist()
    assert not any(batch.flips)
    noise = torch.cat([v + x for v, x in zip(velocities, data, strict=True)])
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


def test_times_fill_their_band_and_are_the_same_in_every_validation(dataset: Dataset) -> None:
    times: list[Tensor] = []

    def zero(tokens: Tensor, t: Tensor, labels: Tensor, layout: PackLayout) -> Tensor:
        times.append(t)
        return torch.zeros_like(tokens)

    held = validator(dataset, budget=4096)
    held.run(zero)
    first = torch.stack(times)
    assert first.shape == (4, 24)
    assert ((first * 4).floor() == torch.arange(4)[:, None]).all()
    assert all(len(set(row.tolist())) == 24 for row in first)
    times.clear()
    held.run(zero)
    assert torch.equal(torch.stack(times), first)


def test_no_gradient_is_kept(dataset: Dataset) -> None:
    model = random_model(OPTIONS)
    outputs: list[Tensor] = []

    def forward(*arguments: object) -> Tensor:
        outputs.append(model(*arguments))
        return outputs[-1]

    validator(dataset, images=2).run(forward)
    assert outputs and not any(output.requires_grad for output in outputs)


def test_an_image_that_cannot_be_read_is_left_out_and_counted(shapes_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes_dataset, tmp_path / "heldout")
    dataset = load_dataset(tmp_path / "heldout")
    model = random_model(OPTIONS)
    whole = validator(dataset, images=64)
    broken_id = whole.batches[0].sample_ids[0]
    ref = dataset.index.ref(broken_id)
    with open(tmp_path / "heldout" / ref.shard, "r+b") as file:
        file.seek(ref.offset)
        file.write(b"\xff" * 8)
    damaged = validator(load_dataset(tmp_path / "heldout"), images=64).run(model)
    assert damaged["images"] == 63 and whole.run(model)["images"] == 64
    assert damaged["loss"] != whole.run(model)["loss"]


def test_classes_are_matched_by_name(dataset: Dataset) -> None:
    names = dataset.manifest.classes
    shuffled = replace(dataset, manifest=replace(dataset.manifest, classes=names[::-1]))
    settings = ValidationConfig(path="heldout", images=8)
    held = Validator(settings, shuffled, dataset.manifest, MODEL, Process(0, 1, CPU), seed=5, token_budget=64)
    for batch in held.batches:
        given = dataset.index.label[list(batch.sample_ids)]
        assert batch.labels.tolist() == (len(names) - 1 - given).tolist()
    other = replace(dataset, manifest=replace(dataset.manifest, classes=["bagel", *names[1:]]))
    with pytest.raises(UserError, match="'bagel'"):
        Validator(settings, other, dataset.manifest, MODEL, Process(0, 1, CPU), seed=5, token_budget=64)


def test_latents_of_another_codec_are_refused(dataset: Dataset) -> None:
    codec = dataset.manifest.codec | {"digest": "another"}
    other = replace(dataset.manifest, codec=codec)
    with pytest.raises(UserError, match="codec of the training set: it differs in digest"):
        Validator(
            ValidationConfig(path="x"), dataset, other, MODEL, Process(0, 1, CPU), seed=5, token_budget=64
        )  # fmt: skip


def test_an_image_that_fits_no_pack_is_refused_with_the_way_out(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"image of 16 tokens.*set validation.token_budget=16"):
        validator(dataset, images=64, budget=10)


def test_packs_are_dealt_evenly_within_the_budget() -> None:
    lengths = np.array([100, 1, 7, 60, 60, 33, 90, 12, 5, 5])
    for ranks in (1, 2, 5, 16):
        packs = deal(lengths, ranks, 100)
        assert len(packs) % ranks == 0
        assert sorted(np.concatenate(packs).tolist()) == list(range(10))
        assert max(lengths[pack].sum() for pack in packs) <= 100
    assert len(deal(lengths, 16, 100)) == 16


def test_buckets_are_named_by_their_tokens() -> None:
    assert size_buckets(np.array([1, 2, 3, 4, 5, 128, 129, 256])).tolist() == [0, 1, 2, 2, 3, 7, 8, 8]
    assert [bucket_name(k) for k in (0, 1, 2, 8)] == ["1", "2", "3-4", "129-256"]
