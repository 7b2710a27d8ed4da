"""`bernoulli_log_prob` beside the binary cross-entropy that people write."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ferrovae import ops
from ferrovae.bench import _log_prob
from ferrovae.bench.case import Case
from ferrovae.bench.machine import machine

SHAPES = [{"N": 240, "D": 784}, {"N": 5000, "D": 784}]


def _formula(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What people write: x [N, D], logits [N, D] -> [N]."""
    return -binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """N examples of D binary dimensions."""
    size, generator = (shape["N"], shape["D"]), torch.Generator().manual_seed(0)
    logits = (torch.randn(size, generator=generator) * 4).to(device)
    x = torch.rand(size, generator=generator).round().to(device)
    promised = device.type == "cpu" and machine()["simd"] == "avx512" and size == (240, 784)
    targets = {"eager": 4.0, "torch.compile": 2.0} if promised else {}
    yield from _log_prob.compared(ops.bernoulli_log_prob, _formula, x, (logits,), shape, targets=targets)
