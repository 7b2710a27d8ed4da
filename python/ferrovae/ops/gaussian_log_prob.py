"""`gaussian_log_prob`: the log-density of data under independent Gaussians."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ferrovae.ops._density import Density

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_sigma: Tensor, *, batch_dims: int = 1) -> Tensor:
    """log p(x | mean, sigma) = sum_d -((x_d - mean_d) / sigma_d)^2 / 2 - log sigma_d - log(2 pi) / 2, in nats.

    Args:
        x: `(N, ...)` data, bool, integers or floating point. Leading batch dimensions may be missing or 1: with
            `batch_dims=2`, a mean `(S, N, ...)` meets x `(N, ...)`, which is not repeated in memory.
        mean: `(N, ...)`, floating point, on the device of x.
        log_sigma: floating point, of a shape that broadcasts to the mean's: one number, one per dimension, one per
            example, or all. No floor: sigma = 0 (-inf) has log-density +inf at the mean and -inf elsewhere.
        batch_dims: how many leading dimensions of the mean to keep; the others are summed over.

    Returns:
        The mean's first `batch_dims` dimensions, float32 (float64 for a float64 mean); 0 where there is nothing to sum
        over, NaN for an example that holds a NaN. Computed and summed in float64 on a CPU. Differentiable, to any
        order, in the mean, log_sigma (summed to its shape) and a floating-point x.

    Raises:
        TypeError: a parameter is not floating point, or an argument is no tensor, or x is complex.
        ValueError: shapes that do not match, devices that differ, `batch_dims` outside 0..mean.ndim.
    """
    return _density(x, mean, log_sigma, batch_dims=batch_dims)


def _scaled(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """(x - mean) / sigma, and 0 at the mean whatever sigma is."""
    residual = x - mean
    return torch.where(residual == 0, 0.0, residual * torch.exp(-log_sigma))


def _log_prob(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    square = _scaled(x, mean, log_sigma).square()
    value = -0.5 * square - log_sigma - _HALF_LOG_TWO_PI
    return torch.where(square == math.inf, -math.inf, value)  # sigma = 0: not infinity minus infinity


def _slopes(x: Tensor, mean: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    residual, inverse = x - mean, torch.exp(-log_sigma)
    scaled = residual * inverse
    at_mean = residual == 0
    # an infinite inverse times 0 is 0; a finite one is kept for the second derivative
    zero = at_mean & (inverse == math.inf)
    slope = torch.where(zero, 0.0, scaled * inverse)
    return slope, torch.where(zero, 0.0, scaled).square() - 1


def _x_slope(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    return -_slopes(x, mean, log_sigma)[0]


_density = Density("gaussian_log_prob", ("mean", "log_sigma"), log_prob=_log_prob, slopes=_slopes, x_slope=_x_slope)
