"""`gaussian_log_prob` beside the formula in plain torch, eager and compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ferrovae.bench import _log_prob
from ferrovae.bench.case import Case
from ferrovae.ops import gaussian_log_prob

SHAPES = _log_prob.SIZES
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def _eager(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """What people write."""
    return (-0.5 * ((x - mean) * torch.exp(-log_sigma)) ** 2 - log_sigma - _HALF_LOG_TWO_PI).sum(1)


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """One learned sigma, and one per dimension of every example."""
    generator, size = torch.Generator(device).manual_seed(0), (shape["N"], shape["D"])
    x, mean, spread = (torch.randn(size, generator=generator, device=device) for _ in range(3))
    for variant, log_sigma in (("one sigma", spread[0, 0]), ("every sigma", spread)):
        yield from _log_prob.compared(gaussian_log_prob, _eager, x, (mean, log_sigma), shape, variant)
