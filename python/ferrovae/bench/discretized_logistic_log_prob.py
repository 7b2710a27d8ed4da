"""`discretized_logistic_log_prob` beside torch code of the same exact formula."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ferrovae import ops
from ferrovae.bench import _log_prob, _logistic
from ferrovae.bench.case import Case

SHAPES = [{"N": 240, "D": 3072}]


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """N examples of D dimensions, 256 levels."""
    size, generator = (shape["N"], shape["D"]), torch.Generator().manual_seed(0)
    x = _logistic.levels(*size, generator=generator)
    mean = x + torch.randn(size, generator=generator) * 0.1
    log_scale = torch.randn(size, generator=generator) * 0.5 - 3
    x, mean, log_scale = x.to(device), mean.to(device), log_scale.to(device)
    targets = {"eager": 10.0, "torch.compile": 2.0} if device.type == "cpu" else {}
    yield from _log_prob.compared(
        ops.discretized_logistic_log_prob, _formula, x, (mean, log_scale), shape, targets=targets
    )


def _formula(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    return _logistic.log_masses(x, mean, log_scale).sum(1)
