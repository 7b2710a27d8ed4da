"""q(z|x): the diagonal normal an encoder's moments stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ferrovae.ops import reparameterize_kl

__all__ = ["DiagonalNormal"]

_LOG_TWO_PI = math.log(2 * math.pi)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.device.type == "cpu" else tensor


class DiagonalNormal(Distribution):
    """N(mean, diag exp(logvar)) with batch shape (B,) and everything behind it as the event; nats.

    Args:
        mean, logvar: (B, *latent). Half precision becomes float32.

    Raises:
        ValueError: the two differ in shape, or have no batch dimension.
    """

    has_rsample = True
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        if mean.shape != logvar.shape or mean.ndim < 1:
            raise ValueError(
                f"DiagonalNormal: mean is {tuple(mean.shape)} and logvar {tuple(logvar.shape)}, expected (B, ...) twice"
            )
        wide = mean.dtype == torch.float64
        self._mean = mean if wide else mean.float()
        self.logvar = logvar.double() if wide else logvar.float()
        super().__init__(mean.shape[:1], mean.shape[1:], validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def mode(self) -> Tensor:
        return self._mean

    @property
    def stddev(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp()

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        new: Self = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        new._mean = self._mean.expand(new._batch_shape + self.event_shape)
        new.logvar = self.logvar.expand(new._batch_shape + self.event_shape)
        return new

    def _event_sum(self, values: Tensor) -> Tensor:
        return _wide(values).flatten(values.ndim - len(self.event_shape)).sum(-1) if self.event_shape else _wide(values)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """z, differentiable in mean and logvar: (*sample_shape, B, *latent); noise from torch's generator."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self._mean.dtype, device=self._mean.device)
        return torch.addcmul(self._mean, self.stddev, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value|x): (..., B, *latent) -> (..., B)."""
        cut = value.ndim - len(self.event_shape)
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ValueError(
                f"DiagonalNormal.log_prob: z is {tuple(value.shape)}, expected (..., B, *{tuple(self.event_shape)})"
            )
        eps = (_wide(value) - _wide(self._mean)) * (-0.5 * _wide(self.logvar)).exp()
        return (self._log_normalizer() - 0.5 * self._event_sum(eps.square())).to(self._mean.dtype)

    def _log_normalizer(self) -> Tensor:
        """log q at the mean: (B,), wide."""
        return -0.5 * (self._event_sum(self.logvar) + math.prod(self.event_shape) * _LOG_TWO_PI)

    def entropy(self) -> Tensor:
        """(B,)."""
        constant = 0.5 * math.prod(self.event_shape) * (1 + _LOG_TWO_PI)
        return (0.5 * self._event_sum(self.logvar) + constant).to(self._mean.dtype)

    def kl(self, *, per_dimension: bool = False) -> Tensor:
        """KL(q(z|x) || N(0, I)) in closed form: (B,), or (B, *latent)."""
        terms = 0.5 * (self._mean.square() + torch.expm1(self.logvar) - self.logvar)
        return terms if per_dimension else self._event_sum(terms).to(terms.dtype)

    def draw(
        self,
        num_samples: int,
        *,
        seed: int | Tensor,
        first_sample: int = 0,
        example_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples that are a function of (seed, example id, sample number) only, and their log q.

        Args:
            num_samples: S.
            seed: 64 bits, an int or an int64 tensor (1,).
            first_sample: number of the first sample: S draws at once, or in chunks, are the same bits.
            example_ids: int64 (B,); by default the position in the batch.

        Returns:
            z (S, B, *latent), differentiable in mean and logvar, and log q(z|x) (S, B), computed from the noise
            and not from (z - mean) / sigma, which would round.
        """
        if len(self.batch_shape) != 1:
            raise ValueError(f"DiagonalNormal.draw: batch shape is {tuple(self.batch_shape)}, expected (B,)")
        zeros = torch.zeros_like(self._mean.detach(), memory_format=torch.contiguous_format)
        eps, _ = reparameterize_kl(
            zeros, zeros, num_samples=num_samples, first_sample=first_sample, seed=seed, example_ids=example_ids
        )
        z = torch.addcmul(self._mean, self.stddev, eps)
        log_q = self._log_normalizer() - 0.5 * self._event_sum(eps.square())
        return z, log_q.to(z.dtype)
