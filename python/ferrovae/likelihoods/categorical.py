"""Categorical likelihood: every dimension of x is one of some integer classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ferrovae.likelihoods.base import Factorized, Likelihood, single
from ferrovae.ops import categorical_log_prob

__all__ = ["Categorical", "CategoricalDistribution"]


class CategoricalDistribution(Factorized):
    """p(x|z) = softmax(logits)[x] per dimension, x in 0 .. classes - 1 (any dtype, whole numbers).

    Args:
        logits: (*batch, classes, *event), float32 or float64.
        event_dims: trailing dimensions of one x.
    """

    def __init__(self, logits: Tensor, event_dims: int, validate_args: bool = True) -> None:
        cut = logits.ndim - event_dims - 1
        super().__init__("categorical", logits.shape[:cut], logits.shape[cut + 1 :], (logits,), validate_args)

    @property
    def logits(self) -> Tensor:
        return self.parameters[0]

    @property
    def classes(self) -> int:
        return self.logits.shape[self._class_dim]

    @property
    def _class_dim(self) -> int:
        return -len(self.event_shape) - 1

    @property
    def mean(self) -> Tensor:
        """The expected level, between 0 and classes - 1: (*batch, *event)."""
        levels = torch.arange(self.classes, dtype=self.logits.dtype, device=self.logits.device)
        levels = levels.reshape(-1, *(1 for _ in self.event_shape))
        return (self.logits.softmax(self._class_dim) * levels).sum(self._class_dim)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """int64 classes: (*sample_shape, *batch, *event)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            table = self.logits.movedim(self._class_dim, -1).softmax(-1).reshape(-1, self.classes)
            draws = torch.Size(sample_shape).numel()
            if not draws or not table.numel():
                return torch.empty(shape, dtype=torch.int64, device=table.device)
            return torch.multinomial(table, draws, replacement=True).T.reshape(shape)

    def _check_data(self, x: Tensor) -> None:
        self._check_range(x, 0, self.classes - 1, f"is outside 0..{self.classes - 1}")
        if x.is_floating_point() and not torch.equal(x, x.floor()):
            self._reject(x, x != x.floor(), "is not a whole number")

    def _total(self, x: Tensor) -> Tensor:
        x, batch = self._matched(x.to(torch.int64) if x.is_floating_point() else x)
        logits = self.logits.expand(*batch, self.classes, *self.event_shape)
        return categorical_log_prob(x, logits, batch_dims=len(batch))


class Categorical(Likelihood):
    """x in 0 .. classes - 1; the decoder gives logits (N, classes * C, ...), class 0 of all channels first.

    Raises:
        ValueError: fewer than two classes.
    """

    name = "categorical"
    data: Literal["unit", "symmetric", "integer"] = "integer"

    def __init__(self, classes: int = 256) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"Categorical: classes is {classes}, expected at least 2")
        self.classes = self.channels = classes

    def extra_repr(self) -> str:
        return f"classes={self.classes}"

    def forward(self, parameters: Tensor, event_dims: int) -> CategoricalDistribution:
        return CategoricalDistribution(self.split(parameters, event_dims), event_dims, self.validate_args)

    def features(self, x: Tensor) -> Tensor:
        return single(x) * (2 / (self.classes - 1)) - 1
