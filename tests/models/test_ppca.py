"""A linear-Gaussian VAE at the probabilistic-PCA solution: ELBO = IWAE-1 = log p(x), per image and in float64."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
import torch

from models.ppca import PPCA


@pytest.fixture(scope="module")
def digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    return torch.from_numpy(sklearn.load_digits().data) / 16


def log_weights(model, x, draws, **options):
    """log p(x|z) + log p(z) - log q(z|x) for each of `draws` keyed samples: (S, B)."""
    with torch.no_grad():
        z, log_q = model.posterior(x).draw(draws, seed=7, **options)
        return model.likelihood(z).log_prob(x) + model.prior.log_prob(z) - log_q


def expected_elbo(model, x):
    """The ELBO without noise: for a log p(x|z) quadratic in z, the mean over 2 q sigma points of q is exact."""
    with torch.no_grad():
        posterior = model.posterior(x)
        offsets = math.sqrt(posterior.event_shape[0]) * torch.eye(posterior.event_shape[0], dtype=torch.float64)
        points = posterior.mean + posterior.stddev * torch.cat((offsets, -offsets))[:, None]
        return model.likelihood(points).log_prob(x).mean(0) - posterior.kl()


@pytest.mark.parametrize("q", [1, 5, 20])
def test_on_digits_the_bound_is_the_evidence(digits, q):
    train, test = digits[:1437], digits[1437:]
    (ppca,) = PPCA.fit(train, q)
    assert ppca.log_px(train).mean().item() == pytest.approx(ppca.train_log_px, abs=1e-9)
    model, truth = ppca.vae(), ppca.log_px(test)
    weights = log_weights(model, test, 4)
    assert weights.dtype == torch.float64
    assert (weights - truth).abs().max() < 1e-8  # every single sample: the weights have no variance
    assert (expected_elbo(model, test) - truth).abs().max() < 1e-8


@pytest.mark.parametrize("inflation", [0.5, 1.5, 2.0])
def test_a_wrong_posterior_variance_costs_its_closed_form(digits, inflation):
    (ppca,) = PPCA.fit(digits, 10)
    gap = ppca.log_px(digits[:50]) - expected_elbo(ppca.vae(inflation=inflation), digits[:50])
    law = 10 / 2 * (inflation - 1 - math.log(inflation))
    torch.testing.assert_close(gap, torch.full_like(gap, law), rtol=0, atol=1e-8)


def test_the_sampled_elbo_is_unbiased(digits):
    """`VAE.elbo` uses the closed-form KL, so its reconstruction keeps the noise of z."""
    (ppca,) = PPCA.fit(digits, 5)
    model, x = ppca.vae(), digits[:20]
    with torch.no_grad():
        samples = torch.stack([model.elbo(x, num_samples=10, seed=seed).elbo for seed in range(40)])
    error = (samples.mean(0) - ppca.log_px(x)).abs()
    assert (error <= 5 * samples.std(0) / 40**0.5).all()
    assert samples.std(0).min() > 0


def images(path):
    raw = gzip.decompress(path.read_bytes())
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784).copy()).double() / 255


def test_on_mnist_the_published_values(mnist):
    """The values stand in the project's notes, computed apart from this code."""
    train, test = images(mnist / "train-images-idx3-ubyte.gz"), images(mnist / "t10k-images-idx3-ubyte.gz")
    for ppca, known in zip(PPCA.fit(train, 10, 50), (186.0241, 517.6033), strict=True):
        truth = ppca.log_px(test)
        assert truth.mean().item() == pytest.approx(known, abs=1e-4)
        model = ppca.vae()
        weights = log_weights(model, test, 1)[0]
        assert weights.mean().item() == pytest.approx(known, abs=1e-4)
        assert (weights - truth).abs().max() < 1e-8
        assert (expected_elbo(model, test[:20]) - truth[:20]).abs().max() < 1e-8
