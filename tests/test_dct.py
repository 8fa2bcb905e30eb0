import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale.autoencoders import codec_from_spec
from nitscale.dct import DCTCodec, kept_coefficients
from nitscale.errors import UserError


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@settings(max_examples=20, deadline=None)
@given(
    factor=st.sampled_from([1, 2, 3, 4, 8, 16]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_with_all_coefficients_the_codec_is_exactly_invertible(factor, rows, columns, seed):
    codec = DCTCodec(factor, 3 * factor**2)
    codec = codec.fit([images(2, 3, 4 * factor, 4 * factor, seed=99)])
    x = images(2, 3, rows * factor, columns * factor, seed=seed)
    latents = codec.encode(x)
    assert latents.shape == (2, 3 * factor**2, rows, columns)
    torch.testing.assert_close(codec.decode(latents), x, rtol=0, atol=2e-5)


def test_dropped_coefficients_are_the_only_loss():
    codec = DCTCodec(8, 20)
    latents = torch.randn(1, 20, 3, 5)
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, rtol=0, atol=1e-5)


def test_a_grey_image_of_one_level_has_only_the_first_channel():
    latents = DCTCodec(16, 32).encode(torch.full((1, 3, 32, 16), 0.5))
    torch.testing.assert_close(latents[0, 0], torch.full((2, 1), 0.5 * 16))  # orthonormal: mean · √(16 · 16)
    assert latents[0, 1:].abs().max() < 1e-5


def test_the_transform_is_orthonormal_in_luma():
    codec = DCTCodec(4, 48)
    grey = images(1, 1, 8, 8).expand(1, 3, 8, 8)
    torch.testing.assert_close(codec.encode(grey).square().sum(), grey[:, 0].square().sum())


def test_32_channels_are_21_of_luma_6_of_cb_and_5_of_cr_and_low_frequencies_come_first():
    kept = kept_coefficients(16, 32)
    components = [component for component, _, _ in kept]
    assert [components.count(component) for component in range(3)] == [21, 6, 5]
    assert kept[:4] == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 0, 1)]
    assert {(u, v) for component, u, v in kept if component == 0} == {(u, v) for u in range(6) for v in range(6 - u)}
    everything = kept_coefficients(4, 48)
    assert len(set(everything)) == 48


def test_the_mirror_image_negates_odd_horizontal_frequencies():
    codec = DCTCodec(8, 24)
    x = images(1, 3, 16, 24)
    signs = torch.tensor([(-1.0) ** v for _, _, v in kept_coefficients(8, 24)])[:, None, None]
    torch.testing.assert_close(codec.encode(x.flip(-1)), codec.encode(x).flip(-1) * signs, rtol=0, atol=1e-5)


def test_fitting_gives_every_channel_zero_mean_and_unit_variance_over_images_of_many_sizes():
    pictures = [images(3, 32, 16, seed=1), images(2, 3, 16, 48, seed=2), images(3, 64, 64, seed=3)]
    codec = DCTCodec(16, 32).fit(pictures)
    cells = torch.cat(
        [codec.encode(p.reshape(-1, *p.shape[-3:])).permute(0, 2, 3, 1).reshape(-1, 32) for p in pictures]
    )
    torch.testing.assert_close(cells.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    torch.testing.assert_close(cells.std(0, correction=0), torch.ones(32), rtol=1e-4, atol=0)


def test_chroma_of_grey_images_is_not_blown_up_by_standardising():
    grey = images(8, 1, 32, 32).expand(-1, 3, -1, -1)
    noisy = grey + torch.randn(grey.shape) / 127.5 / math.sqrt(12)
    assert DCTCodec(16, 32).fit([grey]).encode(noisy).abs().max() < 6


def test_a_codec_is_rebuilt_from_its_json_bit_for_bit():
    codec = DCTCodec(8, 24).fit([images(4, 3, 32, 32)])
    again = codec_from_spec(json.loads(json.dumps(codec.spec())))
    assert again.spec() == codec.spec()
    assert torch.equal(again.encode(images(1, 3, 16, 8)), codec.encode(images(1, 3, 16, 8)))


def test_a_changed_parameter_no_longer_matches_the_digest():
    spec = DCTCodec(8, 24).spec()
    spec["std"][3] = 2.0
    with pytest.raises(UserError, match="do not match their digest"):
        codec_from_spec(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"id": "vqgan"}, "made with 'vqgan'"),
        ({}, "made with None"),
        ({"id": "dct", "factor": 8}, "description is damaged"),
    ],
)
def test_an_unknown_or_damaged_description_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        codec_from_spec(spec)


@pytest.mark.parametrize(("factor", "channels"), [(16, 0), (16, 769), (0, 1), (-4, 3)])
def test_impossible_numbers_of_channels_are_refused(factor, channels):
    with pytest.raises(UserError, match="channels"):
        DCTCodec(factor, channels)


@pytest.mark.parametrize("values", [[1.0], [1.0, float("nan"), 1.0], [1.0, 0.0, 1.0]])
def test_impossible_standard_deviations_are_refused(values):
    with pytest.raises(UserError, match="values of std"):
        DCTCodec(4, 3, std=values)


def test_fitting_to_no_images_is_refused():
    with pytest.raises(UserError, match="no images"):
        DCTCodec().fit([])


@pytest.mark.parametrize("shape", [(1, 3, 17, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_images_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 16"):
        DCTCodec(16, 32).encode(torch.zeros(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_codec_gives_the_same_latents_on_a_gpu():
    codec, x = DCTCodec(16, 32).fit([images(4, 3, 64, 64)]), images(2, 3, 64, 32)
    on_cpu = codec.encode(x)
    on_gpu = codec.to("cuda").encode(x.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-3)
