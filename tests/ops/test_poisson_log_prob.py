"""`poisson_log_prob` against mpmath and at the ends of the range. What all densities share: `test_density.py`."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import poisson_log_prob

INF = math.inf


@pytest.fixture(params=["reference", "rust"], autouse=True)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_against_mpmath(dtype: torch.dtype) -> None:
    # also where terms of millions leave some nats, and counts that are not whole
    counts = [0, 0.25, 1, 2, 6.999, 7, 8, 30, 171, 1000.5, 65_536, 1_000_000, 2.0**40]
    columns = zip(*itertools.product(counts, [-80, -1, 0, 0.1, 3, 6.9, 11.09, 13.8155, 27.7]), strict=True)
    x, log_rate = (torch.tensor(column, dtype=dtype)[:, None] for column in columns)
    with mpmath.workdps(60):
        expected = [
            float(mpmath.mpf(k) * ell - mpmath.exp(ell) - mpmath.loggamma(mpmath.mpf(k) + 1))
            for k, ell in zip(x.double().flatten().tolist(), log_rate.double().flatten().tolist(), strict=True)
        ]
    # float64 holds the terms to 16 digits, the largest here being 10^13
    scale = 1 + x.double().flatten() * 30 + log_rate.double().flatten().exp()
    error = (poisson_log_prob(x, log_rate).double() - torch.tensor(expected, dtype=torch.float64)).abs()
    rounding = torch.tensor(expected, dtype=torch.float64).abs() * (1e-7 if dtype == torch.float32 else 0)
    assert (error <= 2e-15 * scale + rounding).all()


def test_ends_of_the_range() -> None:
    cases = [
        (0, -INF, 0),
        (3, -INF, -INF),
        (0, INF, -INF),
        (3, INF, -INF),
        (-1, 1, -INF),
        (-0.5, 0, -INF),
        (-1, -INF, -INF),
        (INF, 1, -INF),
    ]
    x, log_rate, expected = (torch.tensor(column, dtype=torch.float32) for column in zip(*cases, strict=True))
    assert poisson_log_prob(x[:, None], log_rate[:, None]).tolist() == expected.tolist()


def test_gradients_at_the_ends() -> None:
    log_rate = torch.tensor([[-INF, -INF, INF, 0.0]], requires_grad=True)
    poisson_log_prob(torch.tensor([[0.0, 3.0, 3.0, -1.0]]), log_rate).sum().backward()
    assert log_rate.grad is not None
    assert log_rate.grad.tolist() == [[0.0, 3.0, -INF, 0.0]]


def test_probabilities_sum_to_one() -> None:
    x = torch.arange(400, dtype=torch.float64)[:, None]
    for log_rate in (-3.0, 0.0, 2.0, 5.0):
        mass = poisson_log_prob(x, torch.full((400, 1), log_rate, dtype=torch.float64)).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-12)
