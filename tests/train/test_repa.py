from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from data_prep.encode import encode_folder
from data_prep.pipeline import EncodeConfig
from nitscale.data.loader import read_pack
from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Plan, PlanConfig
from nitscale.errors import UserError
from nitscale.flow.losses import velocity_loss
from nitscale.models.transformer import ModelConfig, PackedTransformer
from nitscale.train.repa import RepaConfig, prepare_repa
from tests.data.test_loader import FEATURES, write_features
from tests.data_prep.pictures import make_folder

MODEL = ModelConfig(in_channels=8, width=32, depth=2, heads=2, num_classes=2)
PLAN = PlanConfig(seed=1, token_budget=64, packs_per_step=4, lanes=1)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=56, layerscale_value=0.1
    )
    model = Dinov2Model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def image_dataset(tmp_path_factory):
    """Eight pictures of 8-pixel cells with the pixels that were encoded."""
    folder = tmp_path_factory.mktemp("images")
    config = EncodeConfig(factor=8, channels=8, shard_samples=4, jpeg=True)
    encode_folder(make_folder(folder / "images"), folder / "latents", config, progress=False)
    return load_dataset(folder / "latents")


def packs_of_a_step(dataset, repa, config=PLAN):
    plan = Plan(dataset, config)
    packs, _ = plan.step(plan.start())
    return [read_pack(dataset, pack, 1, repa.members) for pack in packs]


def random_outputs(batch, width=16):
    generator = torch.Generator().manual_seed(batch.pack)
    shape = batch.tokens.shape
    prediction, velocity = (torch.randn(shape, generator=generator, requires_grad=True) for _ in range(2))
    return prediction, velocity.detach(), torch.randn(shape[0], width, generator=generator, requires_grad=True)


def test_the_model_gets_a_projector_to_the_encoders_features(encoder_folder, image_dataset):
    config = RepaConfig(encoder=encoder_folder, block=2, projector_width=24)
    repa = prepare_repa(config, MODEL, image_dataset, "cpu")
    assert (repa.members, repa.aligns) == (("image",), True)
    assert repa.model == replace(MODEL, feature_block=2, projector_width=24, feature_width=16)
    assert prepare_repa(config, repa.model, image_dataset, "cpu").model == repa.model
    with pytest.raises(UserError, match=r"model\.feature_block=1, but the repa section makes it 2; leave"):
        prepare_repa(config, replace(MODEL, feature_block=1), image_dataset, "cpu")


def test_without_an_encoder_or_direction_nothing_is_asked_for_and_nothing_added(shapes_dataset):
    dataset = load_dataset(shapes_dataset)
    repa = prepare_repa(RepaConfig(), MODEL, dataset, "cpu")
    assert (repa.members, repa.aligns, repa.model) == ((), False, MODEL)
    (batch, *_) = packs_of_a_step(dataset, repa)
    prediction, velocity, _ = random_outputs(batch)
    loss, shares = repa.losses(batch, prediction, velocity, None, total=1)
    assert loss == 0 and shares == {}


@pytest.mark.parametrize("per", ["token", "image"])
def test_packs_add_up_to_the_mean_over_the_step_and_the_weights_weigh(encoder_folder, image_dataset, per):
    config = RepaConfig(encoder=encoder_folder, weight=0.5, directional_weight=2.0, block=1)
    repa = prepare_repa(config, MODEL, image_dataset, "cpu")
    batches = packs_of_a_step(image_dataset, repa)
    total = sum(b.layout.num_tokens if per == "token" else b.layout.num_segments for b in batches)
    sums, loss = {"repa": 0.0, "directional": 0.0}, 0.0
    errors = {"repa": [], "directional": []}
    for batch in batches:
        prediction, velocity, projected = random_outputs(batch)
        share, parts = repa.losses(batch, prediction, velocity, projected, total, per)
        assert share.requires_grad and not any(part.requires_grad for part in parts.values())
        loss += share.item()
        sums = {name: sums[name] + parts[name].item() for name in parts}
        aligned = 1 - F.cosine_similarity(projected, repa.features(batch), dim=1)
        direction = 1 - F.cosine_similarity(prediction, velocity, dim=1)
        for name, values in (("repa", aligned), ("directional", direction)):
            parts_of_images = values.detach().split(batch.layout.lengths)
            errors[name] += list(values.detach()) if per == "token" else [part.mean() for part in parts_of_images]
    for name, values in errors.items():
        assert sums[name] == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
    assert loss == pytest.approx(0.5 * sums["repa"] + 2 * sums["directional"], rel=1e-5)


def test_an_image_of_weight_zero_has_no_part_in_the_losses(encoder_folder, image_dataset):
    repa = prepare_repa(RepaConfig(encoder=encoder_folder, directional_weight=1.0), MODEL_8, image_dataset, "cpu")
    batch = packs_of_a_step(image_dataset, repa)[0]
    weights = torch.ones(batch.layout.num_segments)
    weights[0] = 0
    prediction, velocity, projected = random_outputs(batch)
    loss, _ = repa.losses(replace(batch, weights=weights), prediction, velocity, projected, total=1)
    loss.backward()
    left_out = batch.layout.segment_ids == 0
    for value in (prediction, projected):
        assert not value.grad[left_out].any() and value.grad[~left_out].any(1).all()


MODEL_8 = replace(MODEL, depth=8)


def test_the_features_of_a_mirrored_image_are_those_of_its_mirror_image(encoder_folder, image_dataset):
    repa = prepare_repa(RepaConfig(encoder=encoder_folder, block=1), MODEL, image_dataset, "cpu")
    batch = packs_of_a_step(image_dataset, repa)[0]
    other = read_flipped(image_dataset, repa)
    starts = batch.layout.cu_seqlens.tolist()
    differ = 0.0
    for i, (straight, mirrored) in enumerate(zip(batch.images.split(), other.images.split(), strict=True)):
        assert torch.equal(straight.flip(2), mirrored)
        tokens = slice(starts[i], starts[i + 1])
        alone = repa.encoder.features([straight.flip(2)], [tuple(batch.layout.grids[i].tolist())])
        torch.testing.assert_close(repa.features(other)[tokens], alone, atol=1e-5, rtol=0)
        differ += (repa.features(batch)[tokens] - alone).abs().max()
    assert differ > 0.1


def read_flipped(dataset, repa):
    """The first pack of the first step, every image the other way round."""
    plan = Plan(dataset, PLAN)
    pack = plan.step(plan.start())[0][0]
    return read_pack(dataset, replace(pack, flips=~pack.flips), 1, repa.members)


@pytest.mark.parametrize("source", ["encoder", "precomputed"])
def test_training_aligns_the_model_with_the_features(encoder_folder, image_dataset, tmp_path, source):
    if source == "encoder":
        dataset, model, width = image_dataset, MODEL, 16
        config = RepaConfig(encoder=encoder_folder, block=1, projector_width=32)
    else:
        dataset, model, width = write_features(tmp_path / "set"), replace(MODEL, in_channels=4), FEATURES
        config = RepaConfig(encoder="precomputed", block=1, projector_width=32)
    repa = prepare_repa(config, model, dataset, "cpu")
    assert repa.model.feature_width == width
    transformer = PackedTransformer(repa.model)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    batches = packs_of_a_step(dataset, repa)
    total = sum(batch.layout.num_tokens for batch in batches)
    generator = torch.Generator().manual_seed(0)
    history = []
    for _ in range(15):
        alignment = 0.0
        for batch in batches:
            noise = torch.randn(batch.tokens.shape, generator=generator)
            t = torch.full((batch.layout.num_segments,), 0.5)
            noisy, velocity = (batch.tokens.float() + noise) / 2, noise - batch.tokens.float()
            prediction, projected = transformer(noisy, t, batch.labels, batch.layout, return_features=repa.aligns)
            extra, shares = repa.losses(batch, prediction, velocity, projected, total)
            (velocity_loss(prediction, velocity, batch.layout, batch.weights, total) + extra).backward()
            alignment += shares["repa"].item()
        optimizer.step()
        optimizer.zero_grad()
        history.append(alignment)
    assert history[0] > 0.7
    assert history[-1] < 0.5 * history[0]


def test_a_dataset_without_images_is_refused_with_the_way_out_before_an_encoder_is_loaded(shapes_dataset):
    with pytest.raises(UserError, match="have no image; encode it again with `nitscale encode --jpeg`"):
        prepare_repa(RepaConfig(encoder="no-such/encoder"), MODEL, load_dataset(shapes_dataset), "cpu")
    with pytest.raises(UserError, match="have no features"):
        prepare_repa(RepaConfig(encoder="precomputed"), MODEL, load_dataset(shapes_dataset), "cpu")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight": -1.0}, "weight and directional_weight must not be negative"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"encoder": "precomputed", "oversample": 2}, "oversample=2 has no effect"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        RepaConfig(**options)
