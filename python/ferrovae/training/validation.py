"""The validation curve: the ELBO at KL weight 1 on held-out images, always with the same draws."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ferrovae.training.distributed import Ranks
from ferrovae.training.keys import step_seed

_SEED = step_seed(0, 0)


@torch.no_grad()
def validate(model: nn.Module, loader: Iterable[Any], ranks: Ranks) -> dict[str, float]:
    """Means over the images of `loader`, nats per example: elbo, reconstruction, kl, loss, and the model's extras.

    Each rank sees its part of the batches; the sums are reduced in float64, so all ranks return the same numbers.
    The draws are keyed by the image's index alone: curves of different seeds and steps differ by the model only.
    """
    was_training = model.training
    model.eval()
    totals: dict[str, torch.Tensor] = {}
    count = 0
    for batch in loader:
        keep = batch.valid
        examples = int(keep.sum())
        if examples == 0:  # a rank's share of the last batch may be padding only
            continue
        x, index = (
            (batch.x, batch.index) if examples == len(keep) else (batch.x[keep.to(batch.x.device)], batch.index[keep])
        )
        objective = model.objective(x.to(ranks.device), beta=1.0, seed=_SEED, example_ids=index.to(ranks.device))  # type: ignore[operator]
        values = {name: getattr(objective.elbo, name).double().sum() for name in ("elbo", "reconstruction", "kl")}
        values["loss"] = objective.loss.double() * examples
        for name, value in objective.extra.items():
            values[name] = torch.as_tensor(value, dtype=torch.float64) * examples
        for name, value in values.items():
            totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu()
        count += examples
    model.train(was_training)
    names = sorted({name for names in ranks.gather(sorted(totals)) for name in names})  # type: ignore[attr-defined]
    zero = torch.zeros((), dtype=torch.float64)
    sums = torch.stack([*(totals.get(name, zero) for name in names), torch.tensor(float(count), dtype=torch.float64)])
    *reduced, seen = ranks.sum(sums).tolist()
    return {name: value / seen for name, value in zip(names, reduced, strict=True)}
