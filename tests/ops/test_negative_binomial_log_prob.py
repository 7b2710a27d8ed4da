"""`negative_binomial_log_prob` against mpmath, for every dispersion. What densities share: `test_density.py`."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import negative_binomial_log_prob, poisson_log_prob

INF = math.inf
COUNTS = [0, 0.25, 1, 3, 6.5, 8, 41, 200, 20_000]
THETAS = [1e-4, 0.3, 1, 7.9, 8.1, 99, 101, 1e3, 1e5, 1e6, 1e7, 1e12, 1e30]


@pytest.fixture(params=["reference", "rust"], autouse=True)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    axes = COUNTS, [-30.0, -2.0, 0.7, 5.3], [math.log(theta) for theta in THETAS]
    columns = zip(*itertools.product(*axes), strict=True)
    return tuple(torch.tensor(column, dtype=dtype)[:, None] for column in columns)


def values(*tensors: torch.Tensor) -> zip:
    return zip(*(map(mpmath.mpf, tensor.detach().double().flatten().tolist()) for tensor in tensors), strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_against_mpmath(dtype: torch.dtype) -> None:
    tensors = inputs(dtype)
    with mpmath.workdps(90):
        expected = []
        for x, log_mean, log_theta in values(*tensors):
            mu, theta = mpmath.exp(log_mean), mpmath.exp(log_theta)
            gammas = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
            expected.append(float(x * mpmath.log(mu / (mu + theta)) - theta * mpmath.log1p(mu / theta) + gammas))
    truth = torch.tensor(expected, dtype=torch.float64)
    error = (negative_binomial_log_prob(*tensors).double() - truth).abs()
    assert (error <= (1e-7 if dtype == torch.float32 else 2e-11) * truth.abs().clamp_min(1)).all()


def test_gradients_against_mpmath() -> None:
    x, log_mean, log_theta = inputs(torch.float64)
    leaves = log_mean.requires_grad_(), log_theta.requires_grad_()
    ours = torch.autograd.grad(negative_binomial_log_prob(x, *leaves).sum(), leaves)
    with mpmath.workdps(90):
        expected = []
        for k, log_mu, log_t in values(x, *leaves):
            mu, theta = mpmath.exp(log_mu), mpmath.exp(log_t)
            first = (k - mu) * theta / (mu + theta)
            digammas = mpmath.digamma(k + theta) - mpmath.digamma(theta)
            second = theta * (digammas - mpmath.log1p(mu / theta) + (mu - k) / (mu + theta))
            expected.append((float(first), float(second)))
    scale = 1 + x.flatten() + log_mean.detach().flatten().exp()
    for mine, truth in zip(ours, zip(*expected, strict=True), strict=True):
        error = (mine.flatten() - torch.tensor(truth, dtype=torch.float64)).abs()
        assert (error <= 1e-12 * scale).all()


def test_ends_of_the_range() -> None:
    cases = [
        (0, -INF, 0, 0),
        (0, -INF, INF, 0),
        (0, -INF, -INF, 0),
        (2, -INF, 0, -INF),
        (2, INF, 0, -INF),
        (0, INF, 0, -INF),
        (0, 1, -INF, 0),
        (2, 0, -INF, -INF),
        (-2, 0, 1, -INF),
        (INF, 0, 1, -INF),
    ]
    x, log_mean, log_theta, expected = (torch.tensor(c, dtype=torch.float32)[:, None] for c in zip(*cases, strict=True))
    ours = negative_binomial_log_prob(x, log_mean, log_theta)
    torch.testing.assert_close(ours, expected.flatten(), rtol=0, atol=1e-40)


def test_an_infinite_theta_is_the_poisson_distribution() -> None:
    x, log_mean = torch.randint(0, 50, (4, 30)), torch.randn(4, 30)
    for theta in (INF, 80.0):
        ours = negative_binomial_log_prob(x, log_mean, torch.tensor(theta))
        torch.testing.assert_close(ours, poisson_log_prob(x, log_mean), rtol=1e-6, atol=0)


def test_probabilities_sum_to_one() -> None:
    x = torch.arange(4000, dtype=torch.float64)[:, None]
    for log_mean, log_theta in ((0.0, 0.0), (3.0, -1.0), (5.0, 2.0), (2.0, 12.0)):
        mean = torch.full_like(x, log_mean)
        mass = negative_binomial_log_prob(x, mean, torch.tensor(log_theta, dtype=torch.float64)).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-11)
