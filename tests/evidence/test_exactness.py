"""Laws that hold exactly, or in distribution, where log p(x) is known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from evidence.linear_gaussian import LinearGaussian
from ferrovae.evidence import estimate


def test_exact_posterior_gives_log_px_with_one_sample_and_with_many():
    model = LinearGaussian(10, 40)
    x = model.sample(30)
    truth = model.log_px(x)
    one = estimate(model, x, 1)
    torch.testing.assert_close(one.log_px, truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.elbo, truth, rtol=0, atol=1e-9)
    assert not one.reliable.any(), "one sample proves nothing"
    assert one.standard_error.isnan().all()
    many = estimate(model, x, 100)
    torch.testing.assert_close(many.log_px, truth, rtol=0, atol=1e-9)
    assert many.exact.all()
    assert many.reliable.all()
    assert (many.standard_error == 0).all()
    assert (many.khat == 0).all()
    torch.testing.assert_close(many.ess, torch.full_like(many.ess, 100.0))
    assert many.direction == "exact"


def test_exact_posterior_is_recognised_in_float32():
    model = LinearGaussian(10, 40, dtype=torch.float32)
    x = model.sample(10)
    result = estimate(model, x, 500)
    assert result.exact.all()
    torch.testing.assert_close(result.log_px, model.log_px(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("inflation", [0.9, 1.5])
def test_inflated_posterior_has_its_closed_form_gap_and_weight_variance(inflation):
    latent, samples = 4, 20_000
    model = LinearGaussian(latent, 12, inflation=inflation)
    x = model.sample(16)
    result = estimate(model, x, samples)
    assert model.gap() == pytest.approx(latent / 2 * (inflation - 1 - math.log(inflation)))
    error = result.elbo_standard_error
    assert ((result.log_px.new_tensor(model.gap()) - (model.log_px(x) - result.elbo)).abs() < 5 * error).all()
    # Var(w) / E[w]^2 = (c / sqrt(2c - 1))^q - 1, and ESS / K = 1 / (1 + that).
    variance = (inflation / math.sqrt(2 * inflation - 1)) ** latent - 1
    assert float((samples / result.ess - 1).median()) == pytest.approx(variance, rel=0.1)
    torch.testing.assert_close(result.log_px, model.log_px(x), rtol=0, atol=0.05)
    assert result.reliable.all()
    torch.testing.assert_close(result.reconstruction - result.kl, result.elbo)


def test_rotated_posterior_has_its_closed_form_gap():
    angle = torch.tensor(0.7, dtype=torch.float64)
    rotation = torch.eye(3, dtype=torch.float64)
    rotation[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    model = LinearGaussian(3, 5, rotation=rotation)
    assert model.gap() > 0.01
    x = model.sample(20)
    result = estimate(model, x, 20_000)
    mean_gap = float((model.log_px(x) - result.elbo).mean())
    error = float(result.elbo_standard_error.square().sum().sqrt() / len(x))
    assert abs(mean_gap - model.gap()) < 4 * error


def test_khat_fires_where_the_variance_is_infinite():
    """At c = 1/2 in 50 dimensions 5,000 weights miss log p(x) by half a nat; the standard error must not be shown."""
    narrow = LinearGaussian(50, 60, inflation=0.5)
    x = narrow.sample(20)
    result = estimate(narrow, x, 5000)
    assert float(result.khat.median()) > 0.8
    assert not result.reliable.any()
    assert result.standard_error.isnan().all()
    assert float((narrow.log_px(x) - result.log_px).median()) > 0.3
    good = LinearGaussian(50, 60, inflation=0.9)
    assert estimate(good, x, 5000).reliable.all()


def test_intervals_cover_where_khat_is_small():
    """One image 400 times, each with draws of its own: 400 repeats of one experiment."""
    model = LinearGaussian(5, 10, inflation=1.4)
    x = model.sample(1)
    result = estimate(model, x.expand(400, -1), 1000, seed=3)
    assert (result.khat < 0.5).double().mean() > 0.95
    shown = ~result.standard_error.isnan()
    covered = (result.log_px - model.log_px(x)).abs() <= 1.96 * result.standard_error
    assert 0.90 <= float(covered[shown].double().mean()) <= 0.98


def test_expected_bound_rises_with_the_samples_and_stays_below_the_truth():
    model = LinearGaussian(8, 12, inflation=2.0)
    x = model.sample(1)
    truth = float(model.log_px(x))
    means, errors = [], []
    for samples in (1, 4, 16, 64):
        result = estimate(model, x.expand(1000, -1), samples)
        means.append(float(result.log_px.mean()))
        errors.append(float(result.log_px.std()) / math.sqrt(1000))
    assert all(low < high for low, high in pairwise(means))
    assert all(mean <= truth + 4 * error for mean, error in zip(means, errors, strict=True))
    assert means[-1] == pytest.approx(truth, abs=0.02)
    assert means[0] == pytest.approx(truth - model.gap(), abs=4 * errors[0])
