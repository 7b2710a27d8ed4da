"""Samples of q(z|x) with their log density, and log densities whose shape was checked."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributions import Distribution


class Draws:
    """The draws from the posterior of some images, by sample number.

    Args:
        posterior: batch shape [B]. seed: of its `draw`, where it has one.
        index: the images' numbers, int64 [B], on the posterior's device.

    `point_mass` tells, after the first call, whether every image's posterior has a single latent, which is so when it
    is discrete and has probability 1.
    """

    def __init__(self, posterior: Distribution, seed: int, index: torch.Tensor) -> None:
        self._posterior = posterior
        self._seed = seed
        self._index = index
        self.point_mass = False

    def __call__(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """z [count, B, ...] and log q(z|x) [count, B] of samples `first .. first + count`; one of a point mass."""
        posterior: Any = self._posterior
        shape = (count, len(self._index))
        if hasattr(posterior, "draw"):
            z, log_q = posterior.draw(count, seed=self._seed, first_sample=first, example_ids=self._index)
            _check("posterior(x)", posterior, log_q, shape)
        else:
            z = posterior.sample((count,))
            log_q = log_prob("posterior(x)", posterior, z, shape)
        if first == 0 and not z.is_floating_point() and bool((log_q == 0).all()):
            self.point_mass = True
            return z[:1], log_q[:1]
        return z, log_q


def log_prob(name: str, distribution: Distribution, value: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """`distribution.log_prob(value)`, which must be [samples, images].

    Raises:
        ValueError: it has another shape; `name` says which distribution it is.
    """
    result = distribution.log_prob(value)
    _check(name, distribution, result, shape)
    return result


def _check(name: str, distribution: Distribution, result: torch.Tensor, shape: tuple[int, int]) -> None:
    if result.shape != shape:
        raise ValueError(
            f"estimate: log_prob of {name} ({type(distribution).__name__}, batch shape "
            f"{tuple(distribution.batch_shape)}, event shape {tuple(distribution.event_shape)}) is "
            f"{tuple(result.shape)}, expected (samples, images) = {shape}: what is summed over must be event "
            "dimensions (torch.distributions.Independent)"
        )
