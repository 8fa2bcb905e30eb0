"""Losses: the published numbers, and that packs of a step add up."""

import pytest
import torch

from nitscale.errors import UserError
from nitscale.flow.losses import (
    direction_error,
    directional_loss,
    reduce_tokens,
    repa_loss,
    squared_error,
    velocity_loss,
)
from nitscale.flow.paths import interpolate
from nitscale.flow.timesteps import logit_normal
from nitscale.layout import PackLayout
from nitscale.models.reference import save_reference
from tests.published import TOLERANCE, difference, fit_layout, golden, names, nit_layout, norms, published_model

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name", names("nit_loss*"))
def test_nit_losses_and_their_gradients_are_the_published_ones(name: str, path: str, dtype: torch.dtype) -> None:
    about, tensors = golden(name)
    model, layout = published_model("nit", name, dtype), nit_layout(tensors)
    data, noise, encoded = (tensors[f"in.{key}"].flatten(1).to(dtype) for key in ("images", "noises", "z"))
    t = logit_normal(tensors["in.rnd_normal"].double(), path=path)
    x, target = interpolate(data, noise, t, layout, path)
    prediction, features = model(x, t, tensors["in.y"], layout, return_features=True)
    denoising = velocity_loss(prediction, target, layout)
    directional = directional_loss(prediction, target, layout)
    alignment = repa_loss(features, encoded, layout)
    total = denoising + directional + alignment
    total.backward()
    ours = {
        "t": t,
        "model_input": x,
        "target": target,
        "model_output": prediction,
        "zs_tilde": features,
        "denoising_per_token": squared_error(prediction, target),
        "directional_per_token": direction_error(prediction, target),
        "loss_denoising": denoising,
        "loss_denoising_plus_dir": denoising + directional,
        "proj_loss": alignment,
        "total": total,
        "grad_norms": norms(save_reference(model, gradients=True), about["param_names"]),
    }
    for key, value in ours.items():
        assert difference(value, tensors[f"out.{path}.{key}"]) <= TOLERANCE[dtype], key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names("fit_transport*"))
def test_fit_losses_of_padded_batches_are_met_by_packs(name: str, dtype: torch.dtype) -> None:
    about, tensors = golden(name)
    model, layout = published_model("fit", name, dtype), fit_layout(tensors["in.size"])
    real = tensors["in.mask"].bool()
    data, noise = tensors["in.x1"][real].to(dtype), tensors["in.x0"][real].to(dtype)
    for case in ("train", "train_uniform"):
        t = 1 - tensors[f"out.{case}.t"]  # their time runs from noise to data
        x, target = interpolate(data, noise, t, layout)
        prediction = model(x, t, tensors["in.y"], layout)
        of_images = torch.stack(
            [error.mean() for error in squared_error(prediction, target).split(list(layout.lengths))]
        )
        assert difference(of_images, tensors[f"out.{case}.loss"]) <= TOLERANCE[dtype]
        loss = velocity_loss(prediction, target, layout, per="image")
        assert difference(loss, tensors[f"out.{case}.loss"].mean()) <= TOLERANCE[dtype]
        if case == "train":
            assert difference(1 - t, torch.sigmoid(tensors["in.u"].double())) <= TOLERANCE[dtype]
            assert difference(x, tensors["out.train.xt"][real]) <= TOLERANCE[dtype]
            assert difference(-prediction, tensors["out.train.pred"][real]) <= TOLERANCE[dtype]
            loss.backward()
            gradients = norms(save_reference(model, gradients=True), about["param_names"])
            assert difference(gradients, tensors["out.train.grad_norms"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("per", ["token", "image"])
def test_packs_add_up_to_the_loss_of_their_step(per: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 2), (1, 3), (3, 3)]
    layouts = [PackLayout.from_grids(sizes[:1]), PackLayout.from_grids(sizes[1:])]
    prediction, target = torch.randn(2, 16, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 0.5])
    lengths = torch.tensor([4.0, 3.0, 9.0])
    total = (weights * lengths).sum() if per == "token" else weights.sum()
    whole = velocity_loss(prediction, target, PackLayout.from_grids(sizes), weights, per=per)
    first = velocity_loss(prediction[:4], target[:4], layouts[0], weights[:1], float(total), per)
    second = velocity_loss(prediction[4:], target[4:], layouts[1], weights[1:], float(total), per)
    assert torch.allclose(first + second, whole)


def test_tokens_weigh_alike_or_images_do() -> None:
    layout = PackLayout.from_grids([(1, 1), (1, 3)])
    values = torch.tensor([8.0, 1.0, 2.0, 3.0])
    assert reduce_tokens(values, layout, per="token").item() == pytest.approx(14 / 4)
    assert reduce_tokens(values, layout, per="image").item() == pytest.approx((8 + 2) / 2)


def test_images_of_weight_zero_have_no_part_in_it() -> None:
    layout = PackLayout.from_grids([(1, 2), (1, 2)])
    prediction = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = velocity_loss(prediction, torch.zeros(4, 3), layout, torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(prediction[:2].square().mean().item())
    loss.backward()
    assert prediction.grad is not None and prediction.grad[2:].eq(0).all()
    nothing = velocity_loss(prediction, torch.zeros(4, 3), layout, torch.zeros(2))
    assert nothing.item() == 0


def test_an_unknown_average_is_an_error() -> None:
    with pytest.raises(UserError, match="per='pack'"):
        reduce_tokens(torch.zeros(1), PackLayout.from_grids([(1, 1)]), per="pack")
