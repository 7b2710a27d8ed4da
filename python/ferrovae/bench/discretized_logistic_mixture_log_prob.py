"""`discretized_logistic_mixture_log_prob` beside torch code of the same exact formula."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ferrovae import ops
from ferrovae.bench import _log_prob, _logistic
from ferrovae.bench.case import Case

SHAPES = [{"N": 1, "H": 32, "M": 10}]


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """N images of H x H pixels, M components, 256 levels."""
    count, side, components = shape["N"], shape["H"], shape["M"]
    generator = torch.Generator().manual_seed(0)
    x = _logistic.levels(count, 3, side, side, generator=generator)
    logits = torch.randn(count, components, side, side, generator=generator)
    size = (count, 3, components, side, side)
    means = x[:, :, None] + torch.randn(size, generator=generator) * 0.1
    log_scales = torch.randn(size, generator=generator) * 0.5 - 3
    coefficients = torch.randn(size, generator=generator) * 0.3
    parameters = tuple(value.to(device) for value in (logits, means, log_scales, coefficients))
    targets = {"eager": 10.0, "torch.compile": 2.0} if device.type == "cpu" else {}
    yield from _log_prob.compared(
        ops.discretized_logistic_mixture_log_prob, _formula, x.to(device), parameters, shape, targets=targets
    )


def _formula(x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, coefficients: Tensor) -> Tensor:
    c, red, green = torch.tanh(coefficients), x[:, 0:1], x[:, 1:2]
    of_green, of_blue = means[:, 1] + c[:, 0] * red, means[:, 2] + c[:, 1] * red + c[:, 2] * green
    centre = torch.stack((means[:, 0], of_green, of_blue), 1)
    each = _logistic.log_masses(x[:, :, None], centre, log_scales.clamp_min(-7)).sum(1)
    return torch.logsumexp(log_softmax(logits, 1) + each, 1).flatten(1).sum(1)
