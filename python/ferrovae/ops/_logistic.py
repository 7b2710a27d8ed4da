"""The logistic's mass on one of L even levels of [-1, 1], in plain torch: what the discretised likelihoods share.

Level v = 0 .. T, T = L - 1, is x = n / T with n = 2 v - T. Its ends are `lower` = n - 1 - T mean and `upper` =
n + 1 - T mean half levels from the mean; with a = upper / (T s), b = lower / (T s) and t = a - b the mass is
(1 - exp(-t)) / ((1 + exp(-a)) (1 + exp(b))), without the part of b at the lowest level, of a at the highest, of t at
both. Nothing is lost by subtracting two values of the distribution function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MOST_LEVELS = 65536
# A rate 1 / s that multiplies a distance of 0, and must not be infinite.
_FASTEST = math.exp(88)


def levels(operation: str, value: int) -> None:
    """A number of levels, or `ValueError`."""
    if not 2 <= value <= MOST_LEVELS:
        raise ValueError(f"{operation}: levels is {value}, expected 2 to {MOST_LEVELS}")


def level(x: Tensor, top: int) -> Tensor:
    """The nearest level, 0 to `top`; the lowest or highest beyond the ends."""
    return (x * (top / 2) + top / 2).clamp(0, top).round()


def from_mean(level: Tensor, mean: Tensor, top: int) -> Tensor:
    """n - T mean: float64 where there is one, since at a scale of exp(-7) rounding to float32 costs 3e-5 nats."""
    exact = torch.float32 if mean.device.type == "mps" else torch.float64
    return (2 * level - top).to(exact) - mean.to(exact) * top


def _ends(distance: Tensor, log_scale: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, t and 1 / s."""
    rate = (-log_scale).exp().clamp_max(_FASTEST)
    scaled = rate / top
    upper, lower = (distance + 1).to(log_scale.dtype), (distance - 1).to(log_scale.dtype)
    return upper * scaled, lower * scaled, 2 * scaled, rate


def log_mass(level: Tensor, distance: Tensor, log_scale: Tensor, top: int) -> Tensor:
    """The logarithm of the mass on `level`, whose middle is `distance` half levels from the mean."""
    a, b, width, _ = _ends(distance, log_scale, top)
    lowest, highest = level == 0, level == top
    small = width < 1e-3
    series = (math.log(2 / top) - log_scale) - width / 2 + width.square() / 24
    log_width = torch.where(small, series, (-torch.expm1(-width.clamp_min(1e-3))).log())
    ends = logsigmoid(a).masked_fill(highest, 0) + logsigmoid(-b).masked_fill(lowest, 0)
    return ends + log_width.masked_fill(lowest | highest, 0)


def slopes(level: Tensor, distance: Tensor, log_scale: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The derivatives of `log_mass` in the mean and in the logarithm of the scale."""
    a, b, width, rate = _ends(distance, log_scale, top)
    lowest, highest = level == 0, level == top
    of_a, of_b = torch.sigmoid(-a).masked_fill(highest, 0), torch.sigmoid(b).masked_fill(lowest, 0)
    width = width.clamp_min(1e-30)
    of_width = (width / torch.expm1(width)).masked_fill(lowest | highest, 0)
    # 0 times infinity is 0 here.
    by_a, by_b = torch.where(of_a == 0, 0.0, a * of_a), torch.where(of_b == 0, 0.0, b * of_b)
    return rate * (of_b - of_a), by_b - by_a - of_width
