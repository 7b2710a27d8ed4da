"""The log-likelihoods of independent dimensions, each with data of its support and parameters of usual sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ferrovae import ops


@dataclass(frozen=True)
class Family:
    """An operation, its parameters' names, its data, and log p of every element in plain float64."""

    operation: Callable[..., Tensor]
    parameters: tuple[str, ...]
    data: Callable[..., Tensor]
    truth: Callable[..., Tensor]

    @property
    def name(self) -> str:
        return self.operation.__name__

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """x and the parameters, all of this shape."""
        return self.data(shape).to(dtype), *(1.5 * torch.randn(shape).to(dtype) for _ in self.parameters)


def _gaussian(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, log_sigma.exp(), validate_args=False).log_prob(x)


def _poisson(x: Tensor, log_rate: Tensor) -> Tensor:
    return torch.distributions.Poisson(log_rate.exp(), validate_args=False).log_prob(x)


def _continuous_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return x * logits - torch.log(torch.expm1(logits) / logits)


def _negative_binomial(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    theta = log_theta.exp()
    return torch.distributions.NegativeBinomial(theta, logits=log_mean - log_theta, validate_args=False).log_prob(x)


def _counts(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 30, shape)


FAMILIES = {
    family.name.removesuffix("_log_prob"): family
    for family in (
        Family(ops.gaussian_log_prob, ("mean", "log_sigma"), lambda shape: 2 * torch.randn(shape), _gaussian),
        Family(ops.poisson_log_prob, ("log_rate",), _counts, _poisson),
        Family(ops.continuous_bernoulli_log_prob, ("logits",), torch.rand, _continuous_bernoulli),
        Family(ops.negative_binomial_log_prob, ("log_mean", "log_theta"), _counts, _negative_binomial),
    )
}
