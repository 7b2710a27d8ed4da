"""What the benchmarks of the discretised logistics share: the mass people write, and data for it."""

from __future__ import annotations

import torch
from torch import Tensor


def log_masses(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """What people write for a logistic's mass on one of 256 levels, exact too."""
    rate, half = torch.exp(-log_scale), 1 / 255
    above, below = (x - mean + half) * rate, (x - mean - half) * rate
    lowest, highest = -torch.nn.functional.softplus(-above), -torch.nn.functional.softplus(below)
    inside = lowest + highest + torch.log(-torch.expm1(-2 * half * rate))
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inside))


def levels(*shape: int, generator: torch.Generator) -> Tensor:
    """Random x on 256 levels of [-1, 1]."""
    return (torch.randint(0, 256, shape, generator=generator) * 2 - 255) / 255
