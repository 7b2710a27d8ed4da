"""The learned and the optimal sigma of the Gaussian likelihood."""

from __future__ import annotations

import math

import pytest
import torch

from ferrovae import likelihoods


def test_a_learned_sigma_descends_to_the_root_mean_square():
    family = likelihoods.Gaussian("learned").double()
    residual = 0.3 * torch.randn(40, 50, dtype=torch.float64)
    optimiser = torch.optim.LBFGS(family.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = -family(torch.zeros_like(residual), 1).log_prob(residual).mean()
        value.backward()
        return value

    optimiser.step(loss)
    assert family.scalars()["sigma"].item() == pytest.approx(residual.square().mean().sqrt().item(), rel=1e-5)


def test_the_optimal_sigma_beats_every_other_on_its_batch():
    family = likelihoods.Gaussian("optimal")
    x, mean = torch.rand(8, 3, 4, 4, dtype=torch.float64), torch.rand(8, 3, 4, 4, dtype=torch.float64)
    best = family(mean, 3).log_prob(x).mean()
    sigma = (x - mean).square().mean().sqrt().item()
    assert best.item() == pytest.approx(likelihoods.Gaussian(sigma)(mean, 3).log_prob(x).mean().item(), rel=1e-12)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert best > likelihoods.Gaussian(sigma * factor)(mean, 3).log_prob(x).mean()


def test_its_gradient_is_that_of_the_logarithm_of_the_squared_error():
    family = likelihoods.Gaussian("optimal")
    x, mean = torch.rand(8, 20, dtype=torch.float64), torch.rand(8, 20, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(-family(mean, 1).log_prob(x).mean(), mean)
    closed = 20 * 0.5 * (x - mean).square().mean().log()  # D/2 log MSE, sigma-VAE eq. 5
    torch.testing.assert_close(gradient, torch.autograd.grad(closed, mean)[0])


def test_evaluation_uses_the_running_value_which_a_nan_leaves_alone():
    family = likelihoods.Gaussian("optimal", momentum=0.25)
    variances = []
    for _ in range(3):
        x = torch.rand(64, 10)
        family(torch.zeros_like(x), 1).log_prob(x)
        variances.append(x.square().mean().item())
    assert family.running_variance.item() == pytest.approx(sum(variances) / 3, rel=1e-6)
    before = family.running_variance.clone()
    family.validate_args = False
    family(torch.zeros(2, 3), 1).log_prob(torch.full((2, 3), math.nan))
    assert torch.equal(family.running_variance, before)
    family.eval()
    sigma = before.sqrt().item()
    x, mean = torch.rand(4, 10), torch.rand(4, 10)
    torch.testing.assert_close(family(mean, 1).log_prob(x), likelihoods.Gaussian(sigma)(mean, 1).log_prob(x))
    assert torch.equal(family.running_variance, before)
    torch.testing.assert_close(family(mean, 1).stddev, torch.full((4, 10), sigma))
    assert {"running_variance", "batches"} <= set(family.state_dict())


def test_the_scalars_worth_logging():
    assert likelihoods.Gaussian(0.5).scalars() == {}
    assert likelihoods.Gaussian("learned").scalars()["sigma"].item() == 1
    assert likelihoods.Gaussian("optimal").scalars()["sigma"].item() == 1
    assert likelihoods.Bernoulli().scalars() == {}
