"""`categorical_log_prob` beside cross-entropy, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ferrovae.bench import _log_prob
from ferrovae.bench.case import Case
from ferrovae.ops import categorical_log_prob

# N examples of C classes at D positions
SHAPES = [
    {"N": 240, "C": 10, "D": 1},
    {"N": 240, "C": 2, "D": 784},
    {"N": 64, "C": 256, "D": 784},
    {"N": 1024, "C": 1024, "D": 1},
]


def _eager(x: Tensor, logits: Tensor) -> Tensor:
    """What people write."""
    return -cross_entropy(logits, x, reduction="none").sum(1)


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Logits of a spread of 3."""
    generator, size = torch.Generator(device).manual_seed(0), (shape["N"], shape["C"], shape["D"])
    x = torch.randint(0, shape["C"], (shape["N"], shape["D"]), generator=generator, device=device)
    logits = 3 * torch.randn(size, generator=generator, device=device)
    yield from _log_prob.compared(categorical_log_prob, _eager, x, (logits,), shape)
