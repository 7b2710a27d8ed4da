"""The logistic's mass on a level in sixty digits, and in float64 tensors with gradients."""

from __future__ import annotations

import torch
from mpmath import mp, mpf
from torch.nn.functional import logsigmoid


def exact(level: int, mean: float, log_scale: float, levels: int) -> mpf:
    """log mass, from the side where nothing cancels."""
    with mp.workdps(60):
        scale, top = mp.exp(mpf(log_scale)), levels - 1
        x = mpf(2 * level) / top - 1
        lower, upper = (x - mpf(1) / top - mpf(mean)) / scale, (x + mpf(1) / top - mpf(mean)) / scale

        def tail(distance: mpf) -> mpf:
            return 1 / (1 + mp.exp(distance))

        if level == 0:
            return mp.log(tail(-upper))
        if level == top:
            return mp.log(tail(lower))
        return mp.log(tail(lower) - tail(upper) if lower > 0 else tail(-upper) - tail(-lower))


def on_levels(*shape: int, levels: int = 256) -> torch.Tensor:
    """Random levels of [-1, 1], a fifth of them at the ends."""
    top = levels - 1
    level = (torch.rand(shape) * 1.25 * top - top / 8).round().clamp(0, top)
    return (2 * level - top) / top


def log_masses(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Per element, in float64; differentiable."""
    top = levels - 1
    level = ((x.double() + 1) * top / 2).round()
    rate = (-log_scale.double()).exp()
    distance = (2 * level - top) / top - mean.double()
    below, above = logsigmoid((distance + 1 / top) * rate), logsigmoid((1 / top - distance) * rate)
    inside = below + above + (-torch.expm1(-2 / top * rate)).log()
    return torch.where(level == 0, below, torch.where(level == top, above, inside))
