"""What a model reports of a batch: the ELBO and its two parts, and the objective that training minimises."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Elbo", "Objective", "free_kl"]


class Elbo(NamedTuple):
    """ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z)), each (B,), nats per example summed over dimensions."""

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor


class Objective(NamedTuple):
    """One step's objective.

    loss: scalar to minimise, nats per example (with KL weight and free bits, if any).
    elbo: the `Elbo` itself, detached, always at KL weight 1 and without free bits.
    extra: further scalars worth logging, detached.
    """

    loss: Tensor
    elbo: Elbo
    extra: dict[str, Tensor]


def free_kl(kl: Tensor, free_bits: float) -> Tensor:
    """Sum over latent dimensions of max(free_bits, batch mean of the dimension's KL); a scalar, nats.

    kl: (B, *latent), nats per dimension. A dimension below `free_bits` costs the same whatever it does, and so has
    no gradient (Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow", eq. 15).
    """
    mean = kl.sum(0) / max(kl.shape[0], 1)
    return torch.clamp_min(mean, free_bits).sum()
