"""`continuous_bernoulli_log_prob` against mpmath, around 0 and far out. What densities share: `test_density.py`."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import continuous_bernoulli_log_prob

INF = math.inf
LOGITS = [0.0, 1e-30, 1e-8, 1e-3, 0.1, 0.4999, 0.5, 0.5001, 1.0, 3.0, 17.0, 100.0, 1e4, 1e30]
LOGITS += [-logit for logit in LOGITS]


@pytest.fixture(params=["reference", "rust"], autouse=True)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def inputs(dtype: torch.dtype, *axes: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(column, dtype=dtype)[:, None] for column in zip(*itertools.product(*axes), strict=True)]


def close(ours: torch.Tensor, expected: list[float], dtype: torch.dtype) -> None:
    truth = torch.tensor(expected, dtype=torch.float64)
    tolerance = 2e-7 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(ours.double().flatten(), truth, rtol=tolerance, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_against_mpmath(dtype: torch.dtype) -> None:
    x, logits = inputs(dtype, [0.0, 1.0, 0.5, 0.25, 1e-3], LOGITS)

    def truth(v: float, ell: float) -> float:
        if ell == 0:
            return 0.0
        v, ell = mpmath.mpf(v), mpmath.mpf(ell)
        # the sign of ell taken out: exp(10^30) is too much even for mpmath
        return float(v * ell - (max(ell, 0) + mpmath.log(-mpmath.expm1(-abs(ell)) / abs(ell))))

    with mpmath.workdps(80):
        expected = [
            truth(*pair) for pair in zip(x.double().flatten().tolist(), logits.double().flatten().tolist(), strict=True)
        ]
    close(continuous_bernoulli_log_prob(x, logits), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_against_mpmath(dtype: torch.dtype) -> None:
    x, logits = inputs(dtype, [0.0, 1.0, 0.25], LOGITS)
    logits.requires_grad_()
    continuous_bernoulli_log_prob(x, logits).sum().backward()

    def truth(v: float, ell: float) -> float:
        mean = mpmath.mpf(0.5) if ell == 0 else 1 / -mpmath.expm1(-mpmath.mpf(ell)) - 1 / mpmath.mpf(ell)
        return float(v - mean)

    with mpmath.workdps(100):
        pairs = zip(x.double().flatten().tolist(), logits.double().flatten().tolist(), strict=True)
        expected = [truth(v, max(min(ell, 1e5), -1e5)) if abs(ell) < 1e20 else float(v - (ell > 0)) for v, ell in pairs]
    assert logits.grad is not None
    close(logits.grad, expected, dtype)


def test_infinite_logits_have_all_mass_at_one_end() -> None:
    x, logits = torch.tensor([[1.0], [0.5], [0.0], [0.1]]), torch.tensor([[INF], [INF], [-INF], [-INF]])
    logits.requires_grad_()
    ours = continuous_bernoulli_log_prob(x, logits)
    assert ours.tolist() == [INF, -INF, INF, -INF]
    ours.sum().backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0, -0.5, 0, 0.1])


def test_density_integrates_to_one() -> None:
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    for logit in (0.0, 0.3, -4.0, 20.0):
        density = continuous_bernoulli_log_prob(x, torch.full_like(x, logit)).exp()
        assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1, abs=1e-7)
