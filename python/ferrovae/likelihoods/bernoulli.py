"""Bernoulli likelihood over pixels in [0, 1], from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ferrovae.likelihoods.base import Factorized, Likelihood
from ferrovae.ops import bernoulli_log_prob

__all__ = ["Bernoulli", "BernoulliDistribution"]


class BernoulliDistribution(Factorized):
    """p(x|z) = sigmoid(l)^x (1 - sigmoid(l))^(1-x) per dimension; x may be grey, in [0, 1].

    For grey x this is the usual cross-entropy in nats, not a normalised density.

    Args:
        logits: (*batch, *event), float32 or float64.
        event_dims: trailing dimensions of one x.
    """

    def __init__(self, logits: Tensor, event_dims: int, validate_args: bool = True) -> None:
        cut = logits.ndim - event_dims
        super().__init__("bernoulli", logits.shape[:cut], logits.shape[cut:], (logits,), validate_args)

    @property
    def logits(self) -> Tensor:
        return self.parameters[0]

    @property
    def mean(self) -> Tensor:
        """sigmoid(logits): (*batch, *event)."""
        return self.logits.sigmoid()

    @property
    def variance(self) -> Tensor:
        return self.mean * (-self.logits).sigmoid()

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Binary x: (*sample_shape, *batch, *event)."""
        with torch.no_grad():
            return torch.bernoulli(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))

    def _check_data(self, x: Tensor) -> None:
        self._check_range(x, 0, 1, "is outside [0, 1]")

    def _total(self, x: Tensor) -> Tensor:
        x, batch = self._matched(x)
        return bernoulli_log_prob(x, self.logits.expand(batch + self.event_shape), batch_dims=len(batch))


class Bernoulli(Likelihood):
    """x in [0, 1] (binary, or grey as a cross-entropy); the decoder gives logits (N, C, ...)."""

    name = "bernoulli"

    def forward(self, parameters: Tensor, event_dims: int) -> BernoulliDistribution:
        logits = self.split(parameters, event_dims).squeeze(-event_dims - 1)
        return BernoulliDistribution(logits, event_dims, self.validate_args)
