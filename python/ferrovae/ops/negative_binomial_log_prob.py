"""`negative_binomial_log_prob`: the log-probability of overdispersed counts, as of genes in cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ferrovae.ops._density import Density

# log theta is taken as one of these: beyond, the Poisson distribution to one part in 10^36; below, log p is linear.
_LOWEST, _HIGHEST = -100.0, 85.0
# From this theta on, differences of gamma functions are series: each alone has lost the digits of the difference.
_LARGE = 100.0


def negative_binomial_log_prob(x: Tensor, log_mean: Tensor, log_theta: Tensor, *, batch_dims: int = 1) -> Tensor:
    """log p(x | mu, theta), summed over dimensions, in nats per example, where per dimension it is

    x log(mu / (mu + theta)) + theta log(theta / (mu + theta)) + log(gamma(x + theta) / (gamma(theta) x!)).

    Mean mu, variance mu + mu^2 / theta: the inverse dispersion of Lopez et al. 2018 (scVI). Evaluated in float64 in a
    form whose terms stay small for every theta: at theta = 10^7 it is the Poisson log-probability to 7 digits, where
    the difference of two log-gammas in float32 is off by nats.

    Args:
        x: `(N, ...)` counts, bool, integers or floating point. x! is gamma(x + 1), so a positive x that is not whole
            is given the formula's value; a negative one has log-probability -inf and gradient 0. Leading batch
            dimensions may be missing or 1: with `batch_dims=2`, log means `(S, N, ...)` meet x `(N, ...)`, which is
            not repeated in memory, and the gamma functions are computed once for all samples.
        log_mean: `(N, ...)`, floating point, on the device of x. At -inf (mean 0) x = 0 adds 0 and any other x makes
            the result -inf, as every x does at +inf.
        log_theta: floating point, of a shape that broadcasts to log_mean's: one number, one per dimension (gene), one
            per example, or all. +inf is the Poisson distribution; -inf has all mass at 0.
        batch_dims: how many leading dimensions of log_mean to keep; the others are summed over.

    Returns:
        The first `batch_dims` dimensions of log_mean, float32 (float64 for a float64 log_mean); 0 where there is
        nothing to sum over, NaN for an example that holds a NaN. Differentiable, to any order, in log_mean, log_theta
        (summed to its shape) and a floating-point x.

    Raises:
        TypeError: a parameter is not floating point, or an argument is no tensor, or x is complex.
        ValueError: shapes that do not match, devices that differ, `batch_dims` outside 0..log_mean.ndim.
    """
    return _density(x, log_mean, log_theta, batch_dims=batch_dims)


def _stirling(y: Tensor) -> Tensor:
    """log gamma(y) less (y - 1/2) log y - y + log(2 pi) / 2, for y >= 100."""
    square = y.square().reciprocal()
    return (1 / 12 - square * (1 / 360 - square / 1260)) / y


def _digamma_rest(y: Tensor) -> Tensor:
    """log y - 1 / (2 y) - digamma(y), for y >= 100."""
    square = y.square().reciprocal()
    return square * (1 / 12 - square * (1 / 120 - square / 252))


def _log_rising(x: Tensor, theta: Tensor) -> Tensor:
    """log(gamma(x + theta) / (gamma(theta) theta^x))."""
    small, large = theta.clamp_max(_LARGE), theta.clamp_min(_LARGE)
    direct = torch.lgamma(x + small) - torch.lgamma(small) - x * torch.log(small)
    growth = (large - 0.5 + x) * torch.log1p(x / large) - x
    return torch.where(theta < _LARGE, direct, growth + _stirling(large + x) - _stirling(large))


def _digamma_rise(x: Tensor, theta: Tensor) -> Tensor:
    """theta (digamma(x + theta) - digamma(theta))."""
    small, large = theta.clamp_max(_LARGE), theta.clamp_min(_LARGE)
    direct = small * (torch.digamma(x + small) - torch.digamma(small))
    total = large + x
    rise = torch.log1p(x / large) + 0.5 * (x / large) / total + _digamma_rest(large) - _digamma_rest(total)
    return torch.where(theta < _LARGE, direct, large * rise)


def _log_prob(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    bounded = log_theta.clamp(_LOWEST, _HIGHEST)
    theta, u = torch.exp(bounded), log_mean - bounded
    linear = torch.where(x == 0, 0.0, x * log_mean)  # 0 times infinity is 0 here
    rising = _log_rising(x, theta) - torch.lgamma(x + 1) + (log_theta - _LOWEST).clamp_max(0)
    rising = torch.where(x == 0, 0.0, torch.where((x < 0) | (x == math.inf), -math.inf, rising))
    value = linear + (x + theta) * logsigmoid(-u) + rising
    undefined = value.isnan() & ~x.isnan() & ~log_mean.isnan() & ~log_theta.isnan()  # infinities among themselves
    return torch.where(undefined, -math.inf, value)


def _slopes(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor]:
    bounded = log_theta.clamp(_LOWEST, _HIGHEST)
    theta, u = torch.exp(bounded), log_mean - bounded
    first = x * torch.sigmoid(-u) - theta * torch.sigmoid(u)
    second = _digamma_rise(x, theta) + theta * logsigmoid(-u) - first
    return torch.where(x < 0, 0.0, first), torch.where(x < 0, 0.0, second)


def _x_slope(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    bounded = log_theta.clamp(_LOWEST, _HIGHEST)
    slope = logsigmoid(log_mean - bounded) + torch.digamma(x + torch.exp(bounded)) - torch.digamma(x + 1)
    return torch.where(x < 0, 0.0, slope)


_density = Density(
    "negative_binomial_log_prob",
    ("log_mean", "log_theta"),
    log_prob=_log_prob,
    slopes=_slopes,
    x_slope=_x_slope,
    double=True,
)
