"""Samples: what a picture may depend on, and what it may not."""

import json
from itertools import pairwise

import pytest
import torch
from PIL import Image

from nitscale.errors import UserError
from nitscale.flow.sampling import SamplerConfig, SampleRequest, packs_of_requests
from nitscale.generate.load import load_trained
from nitscale.generate.sample import sample_images
from nitscale.pictures import Row, contact_sheet, save_png, to_pil

REQUESTS = [
    SampleRequest(32, 48, 0, 1),
    SampleRequest(80, 32, 3, 1),
    SampleRequest(64, 64, 5, 2),
    SampleRequest(32, 48, 0, 2),
]


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_a_picture_does_not_depend_on_what_it_is_sampled_with(trained_run, sampler):
    trained = load_trained(trained_run)
    config = SamplerConfig(sampler, steps=4, guidance=2.0, interval=(0.2, 0.9))
    together = {i: image for i, _, image in sample_images(trained.model, trained.codec, REQUESTS, config, False)}
    for i, request in enumerate(REQUESTS):
        ((_, _, alone),) = sample_images(trained.model, trained.codec, [request], config, False)
        assert alone.shape == (3, request.height, request.width)
        torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[3])  # another seed


def test_the_averaged_weights_are_what_is_sampled(trained_run):
    from nitscale.checkpoints import find_weights

    ema = find_weights(trained_run).weights()
    for name, parameter in load_trained(trained_run).model.named_parameters():
        assert torch.equal(parameter, ema[name])


def test_requests_are_cut_into_packs_within_the_budget():
    packs = list(packs_of_requests(REQUESTS, 16, token_budget=40))
    assert [i for pack in packs for i in pack] == [0, 1, 2, 3]
    sizes = [2 * (r.height // 16) * (r.width // 16) for r in REQUESTS]
    assert all(sum(sizes[i] for i in pack) <= 40 for pack in packs)
    assert all(sum(sizes[i] for i in pack) + sizes[following[0]] > 40 for pack, following in pairwise(packs))


def test_broken_weights_are_an_error_and_not_a_picture(trained_run):
    trained = load_trained(trained_run)
    with torch.no_grad():
        trained.model.patch_embedding.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        list(sample_images(trained.model, trained.codec, REQUESTS[:1], SamplerConfig(steps=2), False))


def test_a_saved_picture_carries_its_parameters(tmp_path):
    image = torch.linspace(-1, 1, 3 * 4 * 6).view(3, 4, 6)
    save_png(image, tmp_path / "a.png", {"seed": 3})
    with Image.open(tmp_path / "a.png") as file:
        assert file.size == (6, 4) and json.loads(file.text["nitscale"]) == {"seed": 3}


def test_a_contact_sheet_shows_every_picture():
    images = [torch.full((3, 32, 48), value) for value in (-1.0, 0.0, 1.0)]
    sheet = contact_sheet([Row("a", images, ["x", "y", "z"]), Row("b", images[:1])])
    colours = {colour for _, colour in sheet.getcolors(maxcolors=2**20)}
    assert {to_pil(image).getpixel((0, 0)) for image in images} <= colours
