"""`discretized_logistic_log_prob` beside torch code of the same exact formula."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ferrovae import ops
from ferrovae.bench import _likelihoods
from ferrovae.bench.case import Case

SHAPES = [{"N": 240, "D": 3072}]


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """N examples of D dimensions, 256 levels."""
    size, generator = (shape["N"], shape["D"]), torch.Generator().manual_seed(0)
    x = _likelihoods.levels(*size, generator=generator)
    mean = x + torch.randn(size, generator=generator) * 0.1
    log_scale = torch.randn(size, generator=generator) * 0.5 - 3
    x, mean, log_scale = x.to(device), mean.to(device), log_scale.to(device)
    targets = {"torch eager": 10.0, "torch.compile": 2.0} if device.type == "cpu" else {}
    operation, ours = "discretized_logistic_log_prob", ops.discretized_logistic_log_prob
    yield from _likelihoods.cases(operation, shape, ours, _formula, x, (mean, log_scale), targets)


def _formula(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    return _likelihoods.log_masses(x, mean, log_scale).sum(1)
