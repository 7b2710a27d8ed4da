"""`negative_binomial_log_prob` beside the formula in plain torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ferrovae.bench import _log_prob
from ferrovae.bench.case import Case
from ferrovae.ops import negative_binomial_log_prob

SHAPES = _log_prob.SIZES


def _eager(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """What people write."""
    theta, u = torch.exp(log_theta), log_mean - log_theta
    gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return (x * logsigmoid(u) + theta * logsigmoid(-u) + gammas).sum(1)


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Counts up to 20; one theta per gene."""
    generator, size = torch.Generator(device).manual_seed(0), (shape["N"], shape["D"])
    x = torch.randint(0, 20, size, generator=generator, device=device).float()
    log_mean, spread = (torch.randn(size, generator=generator, device=device) for _ in range(2))
    yield from _log_prob.compared(negative_binomial_log_prob, _eager, x, (log_mean, spread[0]), shape, "theta per gene")
