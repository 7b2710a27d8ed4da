"""Every likelihood, element by element, against mpmath: within 1e-6 * max(1, |value|) also where formulas saturate."""

from __future__ import annotations

import itertools

import pytest
import torch
from mpmath import mp, mpf

from ferrovae import likelihoods

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _digits():
    with mp.workdps(60):
        yield


def elementwise(likelihood, x, *parameters):
    """log p of each element, as a batch of one-dimensional examples."""
    stacked = torch.stack(parameters, -1)  # (N, channels): data of shape (1,)
    return likelihood(stacked, 1).log_prob(x[:, None])


def close(values, truths):
    assert values.isfinite().all()
    for value, truth in zip(values.double().tolist(), truths, strict=True):
        assert abs(mpf(value) - truth) <= 1e-6 * max(1, abs(truth)), (value, truth)


def grid(dtype, *axes):
    return [torch.tensor(column, dtype=dtype) for column in zip(*itertools.product(*axes), strict=True)]


def exact(tensor):
    return [mpf(value) for value in tensor.double().tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bernoulli_at_saturated_logits(dtype):
    logits = [0, 1e-3, -1e-3, 0.7, -3, 16.6, 20, -20, 88, -88, 100, -100, 1000.0]
    x, logit = grid(dtype, [0, 1, 0.5, 0.25, 1e-3], logits)
    truths = [a * b - mp.log(1 + mp.exp(b)) for a, b in zip(exact(x), exact(logit), strict=True)]
    close(elementwise(likelihoods.Bernoulli(), x, logit), truths)


def gaussian_truth(x, mean, log_sigma):
    return -(((x - mean) / mp.exp(log_sigma)) ** 2) / 2 - log_sigma - mp.log(2 * mp.pi) / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_per_dimension_down_to_its_floor(dtype):
    # x - mean of some 3.3 sigma at log sigma -7 makes the two large terms cancel
    x, mean, log_sigma = grid(dtype, [0, 1, 0.503, 100], [0.5, 0.5 - 0.003, -100, 1.001], [-7, -6.3, -1, 0, 3, 7, 20])
    truths = [gaussian_truth(*terms) for terms in zip(exact(x), exact(mean), exact(log_sigma), strict=True)]
    close(elementwise(likelihoods.Gaussian("per_dimension"), x, mean, log_sigma), truths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_below_the_floor_is_the_floor(dtype):
    x, mean, log_sigma = grid(dtype, [0, 1], [0.001, 0.999], [-7.001, -50, -1e9])
    truths = [gaussian_truth(a, b, mpf(-7)) for a, b in zip(exact(x), exact(mean), strict=True)]
    close(elementwise(likelihoods.Gaussian("per_dimension"), x, mean, log_sigma), truths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", [1.0, 0.3, 0.001, 50])
def test_gaussian_with_a_fixed_sigma(dtype, sigma):
    x, mean = grid(dtype, [0, 1, 0.5], [0.5, 0.499, -100, 100, 1e-8])
    truths = [gaussian_truth(a, b, mp.log(mpf(sigma))) for a, b in zip(exact(x), exact(mean), strict=True)]
    close(elementwise(likelihoods.Gaussian(sigma), x, mean), truths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_categorical_with_large_and_nearly_equal_logits(dtype):
    tables = [
        [100, -100, 0, 3],
        [100, 100.0001, 99.9999, 100],
        [-1000, -1000.001, -1001, -5000],
        [0, 0, 0, 0],
        [1e-4, -1e-4, 0, 30],
    ]
    logits = torch.tensor(tables, dtype=dtype).repeat_interleave(4, 0)
    x = torch.arange(4).repeat(len(tables))
    truths = [exact(row)[k] - mp.log(sum(map(mp.exp, exact(row)))) for k, row in zip(x.tolist(), logits, strict=True)]
    close(likelihoods.Categorical(4)(logits, 1).log_prob(x[:, None]), truths)


def logistic_truth(level, mean, log_scale, levels):
    scale, top = mp.exp(log_scale), levels - 1
    x = mpf(2 * level) / top - 1

    def tail(distance):  # of the logistic, below -distance or above distance
        return 1 / (1 + mp.exp(distance / scale))

    below = x - mpf(1) / top - mean, x + mpf(1) / top - mean
    if level == 0:
        return mp.log(tail(-below[1]))
    if level == top:
        return mp.log(tail(below[0]))
    if below[0] > 0:  # from the side where nothing cancels
        return mp.log(tail(below[0]) - tail(below[1]))
    return mp.log(tail(-below[1]) - tail(-below[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [2, 32, 256])
def test_discretized_logistic_at_edges_and_tiny_scales(dtype, levels):
    top = levels - 1
    level, mean, log_scale = grid(
        dtype, sorted({0, 1, top // 2, top - 1, top}), [0, 0.1234, -0.99, 1, -1.01, 1.5], [-7, -6, -4.1, -2, 0, 3, 20]
    )
    x = level.double().mul(2 / top).sub(1).to(dtype)
    truths = [
        logistic_truth(int(k), m, s, levels) for k, m, s in zip(level, exact(mean), exact(log_scale), strict=True)
    ]
    close(elementwise(likelihoods.DiscretizedLogistic(levels), x, mean, log_scale), truths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_discretized_logistic_where_a_level_is_many_scales_wide_and_its_edge_is_near(dtype):
    """x = 2 v / 255 - 1 rounded to float32 is off by 3e-5 scales there, and so would be the result."""
    level, offset, log_scale = grid(torch.float64, [1, 37, 101, 200, 254], [-0.006, -0.0041, 0.0038, 0.005], [-7, -6.5])
    x = level * (2 / 255) - 1
    mean, log_scale = (x + offset).to(dtype), log_scale.to(dtype)
    truths = [logistic_truth(int(k), m, s, 256) for k, m, s in zip(level, exact(mean), exact(log_scale), strict=True)]
    close(elementwise(likelihoods.DiscretizedLogistic(256), x.to(dtype), mean, log_scale), truths)


def test_discretized_logistic_floors_its_scale_and_survives_huge_ones():
    family = likelihoods.DiscretizedLogistic(256)
    x, mean = torch.tensor([-1.0, 1.0, 5 / 255]), torch.tensor([0.9, -0.9, 0.02])
    floor, below = (elementwise(family, x, mean, torch.full((3,), value)) for value in (-7.0, -30.0))
    assert torch.equal(floor, below)
    huge = elementwise(family, x, mean, torch.full((3,), 95.0)).tolist()
    close(torch.tensor(huge), [-mp.log(2), -mp.log(2), mp.log(mpf(2) / 255 / 4) - 95])


@pytest.mark.parametrize(
    ("family", "x"),
    [
        (likelihoods.Bernoulli(), [0.0, 1.0]),
        (likelihoods.Gaussian("per_dimension"), [0.0, 1.0]),
        (likelihoods.Categorical(3), [0, 2]),
        (likelihoods.DiscretizedLogistic(256), [-1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("magnitude", [0.0, 100.0, -100.0])
def test_gradients_are_finite_at_the_extremes(family, x, magnitude):
    parameters = torch.full((2, family.channels), magnitude, requires_grad=True)
    family(parameters, 1).log_prob(torch.tensor(x)[:, None]).sum().backward()
    assert parameters.grad.isfinite().all()
