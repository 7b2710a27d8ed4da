"""Active units: the latent dimensions that say something about x."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ferrovae.evidence import examples
from ferrovae.evidence.memory import largest_chunk
from ferrovae.evidence.protocol import LatentVariableModel, check_model

_IMAGES = 512


@dataclass(frozen=True)
class ActiveUnits:
    """count: units whose variance exceeds the threshold; variance: `Var_x(E_q[z_d|x])`, float64, the shape of z."""

    count: int
    variance: torch.Tensor


def active_units(
    model: LatentVariableModel,
    x: torch.Tensor | Iterable[Any],
    threshold: float = 0.01,
    *,
    memory_budget: int = 256 * 2**20,
) -> ActiveUnits:
    """Count the dimensions d of z with `Var_x(E_q[z_d|x]) > threshold`.

    Args:
        model: with a real-valued latent; only its `posterior` and the posterior's `mean` are used.
        x: images (N, ...) or a `ferrovae.data.Loader`.
        memory_budget: bytes of tensors alive at one time.

    Raises:
        TypeError: the model has no `posterior`, or its latent is discrete.
        ValueError: there are no images, or one image does not fit into the budget.

    Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders" (ICLR 2016), section 5.
    """
    check_model("active_units", model, "posterior")
    seen, chunk = 0, 0
    mean = deviations = torch.zeros((), dtype=torch.float64)
    with examples.evaluating(model):
        for batch in examples.images("active_units", x):
            if len(batch.x) == 0:
                continue
            if not chunk:
                step = partial(_first_means, model, batch.x)
                chunk = largest_chunk(step, min(_IMAGES, len(batch.x)), memory_budget, "active_units: memory_budget")
            for part in batch.x.split(chunk):
                means = _means(model, part)
                # Chan, Golub and LeVeque: two-pass within a chunk, merged exactly across chunks.
                part_mean, total = means.mean(0), seen + len(means)
                shift = part_mean - mean
                deviations = deviations + (means - part_mean).square().sum(0)
                deviations = deviations + shift.square() * (seen * len(means) / total)
                mean = mean + shift * (len(means) / total)
                seen = total
    if seen == 0:
        raise ValueError("active_units: x has no images")
    variance = deviations / seen
    return ActiveUnits(int((variance > threshold).sum()), variance)


def _means(model: LatentVariableModel, x: torch.Tensor) -> torch.Tensor:
    """E_q[z|x], float64 on the CPU."""
    mean = model.posterior(x.to(examples.device_of(model, x))).mean
    if not mean.is_floating_point():
        raise TypeError(f"active_units: the posterior's mean is {mean.dtype}; units of a discrete latent have none")
    return mean.to("cpu", torch.float64)


def _first_means(model: LatentVariableModel, x: torch.Tensor, rows: int) -> torch.Tensor:
    return _means(model, x[:rows])
