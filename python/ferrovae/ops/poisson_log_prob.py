"""`poisson_log_prob`: the log-probability of counts under independent Poisson distributions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ferrovae.ops._density import Density


def poisson_log_prob(x: Tensor, log_rate: Tensor, *, batch_dims: int = 1) -> Tensor:
    """log p(x | rate) = sum_d x_d log rate_d - rate_d - log x_d!, in nats per example.

    Args:
        x: `(N, ...)` counts, bool, integers or floating point. x! is gamma(x + 1), so a positive x that is not whole
            is given the formula's value; a negative one has log-probability -inf and gradient 0. Leading batch
            dimensions may be missing or 1: with `batch_dims=2`, log rates `(S, N, ...)` meet x `(N, ...)`, which is
            not repeated in memory, and whose factorials are computed once.
        log_rate: `(N, ...)`, floating point, on the device of x. At -inf (rate 0) x = 0 adds 0 and any other x makes
            the result -inf, as every x does at +inf.
        batch_dims: how many leading dimensions of log_rate to keep; the others are summed over.

    Returns:
        The first `batch_dims` dimensions of log_rate, float32 (float64 for a float64 log_rate); 0 where there is
        nothing to sum over, NaN for an example that holds a NaN. Computed in float64: the terms of a count of
        thousands cancel to some nats. Differentiable, to any order, in log_rate (gradient x - rate) and in a
        floating-point x.

    Raises:
        TypeError: log_rate is not floating point, or an argument is no tensor, or x is complex.
        ValueError: shapes that do not match, devices that differ, `batch_dims` outside 0..log_rate.ndim.
    """
    return _density(x, log_rate, batch_dims=batch_dims)


def _log_prob(x: Tensor, log_rate: Tensor) -> Tensor:
    linear = torch.where(x == 0, 0.0, x * log_rate)  # 0 times infinity is 0 here
    value = linear - torch.exp(log_rate) - torch.where(x < 0, math.inf, torch.lgamma(x + 1))
    undefined = value.isnan() & ~x.isnan() & ~log_rate.isnan()  # infinities among themselves
    return torch.where(undefined, -math.inf, value)


def _slopes(x: Tensor, log_rate: Tensor) -> tuple[Tensor]:
    return (torch.where(x < 0, 0.0, x - torch.exp(log_rate)),)


def _x_slope(x: Tensor, log_rate: Tensor) -> Tensor:
    return torch.where(x < 0, 0.0, log_rate - torch.digamma(x + 1))


_density = Density("poisson_log_prob", ("log_rate",), log_prob=_log_prob, slopes=_slopes, x_slope=_x_slope, double=True)
