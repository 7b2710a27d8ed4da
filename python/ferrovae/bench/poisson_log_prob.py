"""`poisson_log_prob` beside the formula in plain torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ferrovae.bench import _log_prob
from ferrovae.bench.case import Case
from ferrovae.ops import poisson_log_prob

SHAPES = _log_prob.SIZES


def _eager(x: Tensor, log_rate: Tensor) -> Tensor:
    """What people write."""
    return (x * log_rate - torch.exp(log_rate) - torch.lgamma(x + 1)).sum(1)


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Counts up to 20."""
    generator, size = torch.Generator(device).manual_seed(0), (shape["N"], shape["D"])
    x = torch.randint(0, 20, size, generator=generator, device=device).float()
    log_rate = torch.randn(size, generator=generator, device=device)
    yield from _log_prob.compared(poisson_log_prob, _eager, x, (log_rate,), shape)
