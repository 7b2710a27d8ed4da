"""q(z|x) of a deterministic encoder: all its mass on one z."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints


class PointMass(Distribution):
    """The distribution of codes that are known: batch shape (B,), the rest of `codes` is the event.

    codes: int64 (B, *grid). Probabilities are counted over codes: log_prob is 0 at `codes` and -inf elsewhere, and
    the entropy is 0 nats.

    Raises:
        ValueError: codes have no batch dimension.
        TypeError: codes are not int64.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, codes: Tensor) -> None:
        if codes.dtype != torch.int64:
            raise TypeError(f"PointMass: codes are {codes.dtype}, expected torch.int64")
        if codes.ndim < 1:
            raise ValueError("PointMass: codes have no dimensions, expected (B, *grid)")
        self.codes = codes
        super().__init__(codes.shape[:1], codes.shape[1:], validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.nonnegative_integer, len(self.event_shape))

    @property
    def mode(self) -> Tensor:
        return self.codes

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        new: Self = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        new.codes = self.codes.expand(new._batch_shape + self.event_shape)
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """The codes, repeated as a view: int64 (*sample_shape, B, *grid)."""
        return self.codes.expand(self._extended_shape(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """(..., B, *grid) -> float32 (..., B)."""
        cut = value.ndim - len(self.event_shape)
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ValueError(
                f"PointMass.log_prob: z is {tuple(value.shape)}, expected (..., B, *{tuple(self.event_shape)})"
            )
        batch = torch.broadcast_shapes(value.shape[:cut], self.batch_shape)
        same = (value == self.codes).expand(*batch, *self.event_shape)
        same = same.flatten(len(batch)).all(-1) if self.event_shape else same
        return torch.where(same, 0.0, -torch.inf)

    def entropy(self) -> Tensor:
        """(B,), nats."""
        return torch.zeros(self.batch_shape, device=self.codes.device)
