"""Statistics of log weights, against mpmath, closed forms, and k-hat written again from the paper."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch

from ferrovae.evidence import _rust, log_weight_statistics


def khat_of_the_paper(log_weights):
    """Vehtari et al. 2024 with Zhang and Stephens 2009, written plainly in numpy; no care for ties."""
    samples = len(log_weights)
    tail_length = math.ceil(min(0.2 * samples, 3 * math.sqrt(samples)))
    weights = np.sort(np.exp(log_weights - log_weights.max()))
    excess = weights[-tail_length:] - weights[-tail_length - 1]
    n, quartile = tail_length, excess[int(tail_length / 4 + 0.5) - 1]
    grid = 30 + int(math.sqrt(n))
    theta = 1 / excess[-1] + (1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3 * quartile)
    shape = np.log1p(-theta[:, None] * excess).mean(1)
    log_likelihood = n * (np.log(-theta / shape) - shape - 1)
    with np.errstate(over="ignore"):
        posterior = 1 / np.exp(log_likelihood - log_likelihood[:, None]).sum(1)
    estimate = np.log1p(-(theta * posterior).sum() * excess).mean()
    return (n * estimate + 10 * 0.5) / (n + 10)


@pytest.mark.parametrize("samples", [30, 100, 224, 1000, 5000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_khat_equals_the_paper(samples, scale):
    log_weights = torch.randn(5, samples, dtype=torch.float64) * scale - 100
    khat = log_weight_statistics(log_weights).khat
    expected = [khat_of_the_paper(row.numpy()) for row in log_weights]
    np.testing.assert_allclose(khat.numpy(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [0.3, 0.7])
def test_khat_finds_the_shape_of_a_pareto_tail(shape):
    """Weights exactly generalised Pareto: over 64 rows of 20,000 the mean is within its sampling error of the truth."""
    uniform = torch.rand(64, 20_000, dtype=torch.float64)
    log_weights = torch.log1p((uniform**-shape - 1) / shape)
    found = log_weight_statistics(log_weights)
    error = float(found.khat.std()) / 8
    tail = math.ceil(3 * math.sqrt(20_000))
    shrunk = (shape * tail + 5) / (tail + 10)
    assert abs(float(found.khat.mean()) - shrunk) < 4 * error
    good = min(1 - 1 / math.log10(20_000), 0.7)
    assert torch.equal(found.reliable, found.khat <= good)
    assert torch.equal(found.standard_error.isnan(), ~found.reliable)


def test_log_mean_is_right_at_the_extremes():
    rows = [
        [-1e5, -1e5 - 3.25, -1e5 - 40.0, -2e5],
        [1e5, 1e5 - 1e-3, 0.0, -1e5],
        [-1e-9, 0.0, 1e-9, -700.0],
        [-750.0, -760.0, -745.1, -math.inf],
    ]
    found = log_weight_statistics(torch.tensor(rows, dtype=torch.float64))
    with mpmath.workdps(60):
        for row, log_mean, ess in zip(rows, found.log_mean.tolist(), found.ess.tolist(), strict=True):
            weights = [mpmath.exp(value) if value > -math.inf else mpmath.mpf(0) for value in row]
            assert log_mean == pytest.approx(float(mpmath.log(mpmath.fsum(weights) / len(row))), rel=1e-14, abs=1e-15)
            squares = mpmath.fsum(weight**2 for weight in weights)
            assert ess == pytest.approx(float(mpmath.fsum(weights) ** 2 / squares), rel=1e-10)


def test_effective_sample_size_has_its_closed_forms():
    dominated = torch.zeros(100, dtype=torch.float64)
    dominated[0] = 60.0
    some = torch.full((100,), -math.inf, dtype=torch.float64)
    some[:25] = -3.0
    found = log_weight_statistics(torch.stack([torch.full_like(some, -700.0), dominated, some]))
    torch.testing.assert_close(found.ess, torch.tensor([100.0, 1.0, 25.0], dtype=torch.float64))
    torch.testing.assert_close(found.log_mean, torch.tensor([-700.0, 60 - math.log(100), -3 - math.log(4)]).double())
    assert found.exact.tolist() == [True, False, False]
    assert found.standard_error[0] == 0


def test_standard_error_is_the_delta_method():
    log_weights = torch.randn(3, 500, dtype=torch.float64) * 0.3
    weights = log_weights.exp()
    expected = weights.std(1, correction=0) / weights.mean(1) / math.sqrt(500)
    found = log_weight_statistics(log_weights)
    torch.testing.assert_close(found.standard_error, expected)
    torch.testing.assert_close(found.mean, log_weights.mean(1))
    torch.testing.assert_close(found.mean_standard_error, log_weights.std(1) / math.sqrt(500))


def test_zero_weights_and_ties_give_numbers():
    all_zero = torch.full((1000,), -math.inf, dtype=torch.float64)
    few = all_zero.clone()
    few[:3] = 1.0
    half = all_zero.clone()
    half[::2] = 0.0
    found = log_weight_statistics(torch.stack([all_zero, few, half]))
    assert found.log_mean[0] == -math.inf
    assert found.ess.tolist() == pytest.approx([0.0, 3.0, 500.0])
    assert found.reliable.tolist() == [False, False, True], "an atom holding half of all draws is no tail"
    assert found.khat.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streaming_in_any_cut_equals_one_batch(dtype):
    log_weights = (torch.randn(7, 1234, dtype=torch.float64) * 2 - 90).to(dtype)
    whole = _rust.Weights(7, 1234)
    whole.add(log_weights)
    streamed = _rust.Weights(7, 1234)
    for part in log_weights.split([1, 0, 500, 233, 500], dim=1):
        assert streamed.add(part) is None
    a, b = (torch.tensor(weights.rows(dtype), dtype=torch.float64) for weights in (whole, streamed))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert torch.equal(a[:, 5], b[:, 5]), "k-hat sees the same weights"
    reference = torch.logsumexp(log_weights.double(), 1) - math.log(1234)
    torch.testing.assert_close(a[:, 0], reference, rtol=1e-13, atol=0)


def test_tail_memory_does_not_grow_with_the_samples():
    """A million weights in a thousand pieces: k-hat is that of all of them."""
    log_weights = torch.randn(1, 1_000_000, dtype=torch.float64)
    streamed = _rust.Weights(1, 1_000_000)
    for part in log_weights.split(1000, dim=1):
        streamed.add(part)
    row = streamed.rows(torch.float64)[0]
    assert row[5] == pytest.approx(khat_of_the_paper(log_weights[0].numpy()), rel=1e-8)
    assert row[0] == pytest.approx(float(torch.logsumexp(log_weights[0], 0)) - math.log(1e6), rel=1e-10)


def test_strided_and_empty_input_works():
    log_weights = torch.randn(60, 4, dtype=torch.float64)
    transposed = log_weight_statistics(log_weights.T)
    contiguous = log_weight_statistics(log_weights.T.contiguous())
    for a, b in zip(transposed, contiguous, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert len(log_weight_statistics(torch.empty(0, 5)).khat) == 0


def test_bad_input_is_named():
    bad = torch.zeros(3, 4)
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match="nan at row 1, sample 2"):
        log_weight_statistics(bad)
    bad[1, 2] = math.inf
    with pytest.raises(ValueError, match="inf at row 1, sample 2"):
        log_weight_statistics(bad)
    with pytest.raises(TypeError, match=r"log_weights is torch.int64, expected float32 or float64"):
        log_weight_statistics(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"log_weights is \(3, 0\), expected \(N, K\)"):
        log_weight_statistics(torch.zeros(3, 0))
