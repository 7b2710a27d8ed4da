"""What the evidence asks of a model: three distributions."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.distributions import Distribution


class LatentVariableModel(Protocol):
    """Anything with q(z|x), p(x|z) and p(z) as `torch.distributions.Distribution` objects.

    Shapes, for B images of event shape `*x`, latents of event shape `*z` and S samples:
        `posterior(x [B, *x])`: batch shape [B], event shape `*z`.
        `prior`: batch shape [], event shape `*z`.
        `likelihood(z [S, B, *z])`: batch shape [S, B], event shape `*x`; its `log_prob` broadcasts x [B, *x].

    Whatever is summed over must be an event dimension: `torch.distributions.Independent(Normal(mean, std), 1)`, not
    `Normal(mean, std)`. Densities are in nats.

    A posterior may offer `draw(num_samples, *, seed, first_sample=0, example_ids=None) -> (z [S, B, *z],
    log_q [S, B])`, whose noise is a function of (seed, example id, sample number) alone: then results do not depend
    on how the work is cut. Otherwise `sample` and `log_prob` are used, under torch's generator.
    """

    def posterior(self, x: torch.Tensor) -> Distribution:
        """q(z|x) of each image."""

    def likelihood(self, z: torch.Tensor) -> Distribution:
        """p(x|z) of each latent."""

    @property
    def prior(self) -> Distribution:
        """p(z)."""


def check_model(function: str, model: Any, *names: str) -> None:
    """Raise `TypeError` unless `model` has all `names`."""
    # A property counts as there, without asking for its value: it may need a first batch.
    missing = [name for name in names if not hasattr(type(model), name) and not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{function}: model is a {type(model).__name__} without {' and '.join(missing)}, expected a "
            "ferrovae.evidence.LatentVariableModel (posterior(x), likelihood(z), prior)"
        )
