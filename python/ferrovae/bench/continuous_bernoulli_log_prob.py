"""`continuous_bernoulli_log_prob` beside the formula in plain torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ferrovae.bench import _log_prob
from ferrovae.bench.case import Case
from ferrovae.ops import continuous_bernoulli_log_prob

SHAPES = _log_prob.SIZES


def _eager(x: Tensor, logits: Tensor) -> Tensor:
    """What people write: near 0 two terms of the series stand for the normaliser."""
    near = logits.abs() < 0.05
    far = torch.where(near, 1.0, logits)
    closed = torch.log(torch.expm1(far) / far)
    return (x * logits - torch.where(near, 0.5 * logits + logits**2 / 24, closed)).sum(1)


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Grey values."""
    generator, size = torch.Generator(device).manual_seed(0), (shape["N"], shape["D"])
    x = torch.rand(size, generator=generator, device=device)
    logits = 2 * torch.randn(size, generator=generator, device=device)
    yield from _log_prob.compared(continuous_bernoulli_log_prob, _eager, x, (logits,), shape)
