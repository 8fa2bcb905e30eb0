"""The published ways of sampling."""

import pytest

from nitscale.errors import UserError
from nitscale.flow import ddpm, samplers
from nitscale.flow.presets import FIT, NIT, sampling_preset
from nitscale.models.presets import PRESETS


def test_every_model_has_a_published_sampling_by_a_sampler_that_exists() -> None:
    for model in PRESETS:
        for size in NIT:
            name = sampling_preset(model, *size).sampler
            assert callable(getattr(ddpm if name == "ancestral" else samplers, name))
    assert sampling_preset("fit-xl", 256, 256).sampler == "ancestral"


def test_sizes_take_the_sampling_of_the_nearest_published_one() -> None:
    assert sampling_preset("nit-xl", 256, 256).guidance.scale == 2.25
    assert sampling_preset("nit-b", 288, 224) == NIT[256, 256]
    assert sampling_preset("nit-xl", 1100, 1000) == NIT[1024, 1024]
    assert sampling_preset("nit-xl", 1000, 300) == NIT[960, 320]
    assert sampling_preset("fitv2-xl", 512, 512) == FIT["fitv2-xl"]


def test_fit_is_guided_on_three_channels_and_nit_on_all() -> None:
    assert {sampling.guidance.channels for sampling in FIT.values()} == {3}
    assert {sampling.guidance.channels for sampling in NIT.values()} == {None}


def test_a_model_without_a_published_sampling_is_an_error() -> None:
    with pytest.raises(UserError, match="'dit-xl'"):
        sampling_preset("dit-xl", 256, 256)
