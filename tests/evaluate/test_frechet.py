"""The Fréchet distance against closed forms and an independent implementation."""

import pytest
import torch

from nitscale.evaluate.frechet import frechet_distance, latent_features


def test_two_gaussians_in_one_dimension_have_the_closed_form():
    a, b = torch.randn(500, 1, dtype=torch.float64), 3 * torch.randn(700, 1, dtype=torch.float64) + 2
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_it_equals_scipys_square_root_of_the_product():
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    b = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    cov_a, cov_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    expected = (a.mean(0) - b.mean(0)).square().sum().item()
    expected += (cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_a_set_is_at_distance_zero_from_itself():
    a = torch.randn(50, 80)  # fewer samples than dimensions: a singular covariance
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_latents_of_any_size_have_features_of_one_length_that_keep_the_place():
    latents = [torch.zeros(4, 3, 5), torch.zeros(4, 6, 2)]
    latents[0][0, 0, 0] = 12.0
    features = latent_features(latents)
    assert features.shape == (2, 16)
    assert features[0, 0] > 0 and features[0, 1:].abs().max() == 0
