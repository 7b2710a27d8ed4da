"""`continuous_bernoulli_log_prob`: the log-density of data in [0, 1] under independent continuous Bernoullis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ferrovae.ops._density import Density

# Below this size of a logit the normaliser is a series: its closed form divides 0 by 0 at 0.
_SMALL = 0.5
# B(2 k) / (2 k (2 k)!) for k = 1 .. 7: log(sinh(l / 2) / (l / 2)) in powers of l^2
_SERIES = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600, -691 / 15692092416000, 1 / 1046139494400)
# B(2 k) / (2 k)!: its derivative over l
_SLOPES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000, 1 / 74724249600)


def continuous_bernoulli_log_prob(x: Tensor, logits: Tensor, *, batch_dims: int = 1) -> Tensor:
    """log p(x | logits) = sum_d x_d l_d - log((exp(l_d) - 1) / l_d), in nats per example.

    The density on [0, 1] that is proportional to exp(x l), uniform at l = 0 (Loaiza-Ganem and Cunningham 2019, The
    continuous Bernoulli). Unlike the Bernoulli cross-entropy of grey values it is normalised.

    Args:
        x: `(N, ...)` data in [0, 1], bool, integers or floating point. Leading batch dimensions may be missing or 1:
            with `batch_dims=2`, logits `(S, N, ...)` meet x `(N, ...)`, which is not repeated in memory.
        logits: `(N, ...)`, floating point, on the device of x. An infinite one has all its mass at one end: log-density
            +inf there (x = 1 at +inf), -inf elsewhere.
        batch_dims: how many leading dimensions of the logits to keep; the others are summed over.

    Returns:
        The logits' first `batch_dims` dimensions, float32 (float64 for float64 logits); 0 where there is nothing to
        sum over, NaN for an example that holds a NaN. Computed and summed in float64 on a CPU. Differentiable, to any
        order, in the logits (gradient x - mean) and in a floating-point x (gradient l).

    Raises:
        TypeError: the logits are not floating point, or an argument is no tensor, or x is complex.
        ValueError: shapes that do not match, devices that differ, `batch_dims` outside 0..logits.ndim.
    """
    return _density(x, logits, batch_dims=batch_dims)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def _log_prob(x: Tensor, logits: Tensor) -> Tensor:
    size = logits.abs()
    error = x - (logits > 0).to(x.dtype)  # x l - max(l, 0) = error l, without cancellation
    linear = torch.where(error == 0, 0.0, error * logits)
    square = size.clamp_max(_SMALL).square()
    far = size.clamp_min(_SMALL)
    rest = torch.where(
        size < _SMALL,
        0.5 * size - square * _polynomial(_SERIES, square),
        torch.log(far) - torch.log1p(-torch.exp(-far)),
    )
    certain = torch.where(error == 0, math.inf, linear)
    return torch.where(size == math.inf, certain, linear + rest)


def _slopes(x: Tensor, logits: Tensor) -> tuple[Tensor]:
    """x less the mean 1 / (1 - exp(-l)) - 1 / l, which is 1/2 plus an odd series."""
    near = logits.clamp(-_SMALL, _SMALL)
    close = x - 0.5 - near * _polynomial(_SLOPES, near.square())
    far = logits.abs().clamp_min(_SMALL)
    rest = 1 / far - 1 / torch.expm1(far)
    error = x - (logits > 0).to(x.dtype)
    return (torch.where(logits.abs() < _SMALL, close, error + torch.where(logits > 0, rest, -rest)),)


def _x_slope(x: Tensor, logits: Tensor) -> Tensor:
    return logits


_density = Density("continuous_bernoulli_log_prob", ("logits",), log_prob=_log_prob, slopes=_slopes, x_slope=_x_slope)
