"""`gaussian_log_prob` against mpmath, down to a vanishing sigma. What all densities share: `test_density.py`."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import gaussian_log_prob

INF = math.inf


@pytest.fixture(params=["reference", "rust"], autouse=True)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_against_mpmath(dtype: torch.dtype) -> None:
    columns = zip(*itertools.product([0, 0.503, 100], [0.5, -1e-3, 100.001], [-300, -30, -7, 0, 3, 300]), strict=True)
    x, mean, log_sigma = (torch.tensor(column, dtype=dtype)[:, None] for column in columns)
    with mpmath.workdps(400):
        terms = zip(*(tensor.double().flatten().tolist() for tensor in (x, mean, log_sigma)), strict=True)
        truths = [
            -(((mpmath.mpf(a) - b) / mpmath.exp(s)) ** 2) / 2 - s - mpmath.log(2 * mpmath.pi) / 2 for a, b, s in terms
        ]
        expected = torch.tensor([float(truth) for truth in truths], dtype=torch.float64).to(dtype)  # inf where it is
    ours = gaussian_log_prob(x, mean, log_sigma)
    torch.testing.assert_close(ours, expected, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)


def test_a_sigma_of_zero_is_certain() -> None:
    x = torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0]])
    mean = torch.tensor([[1.0], [2.0], [INF], [2.0], [1.0]])
    log_sigma = torch.tensor([[-INF], [-INF], [0.0], [INF], [-800.0]])
    ours = gaussian_log_prob(x, mean, log_sigma).tolist()
    assert ours[:4] == [INF, -INF, -INF, -INF]
    assert ours[4] == pytest.approx(800 - 0.5 * math.log(2 * math.pi))


def test_gradients_at_the_mean_are_finite_for_every_sigma() -> None:
    mean, log_sigma = torch.ones(1, 3, requires_grad=True), torch.tensor([[-800.0, -INF, 0.0]], requires_grad=True)
    gaussian_log_prob(torch.ones(1, 3), mean, log_sigma).sum().backward()
    assert mean.grad is not None
    assert mean.grad.tolist() == [[0.0] * 3]
    assert log_sigma.grad is not None
    assert log_sigma.grad.tolist() == [[-1.0] * 3]


def test_density_integrates_to_one() -> None:
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    mean, log_sigma = torch.tensor([0.3], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    density = gaussian_log_prob(x[:, None], mean.expand(60_001, 1), log_sigma).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-12)
