"""Discretised logistic likelihood: the logistic's mass on each of some evenly spaced levels of [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ferrovae.likelihoods.base import Factorized, Likelihood
from ferrovae.ops import discretized_logistic_log_prob

__all__ = ["DiscretizedLogistic", "DiscretizedLogisticDistribution"]

LOG_SCALE_FLOOR = -7.0


class DiscretizedLogisticDistribution(Factorized):
    """p(x|z) = F((x + h - mean) / s) - F((x - h - mean) / s) per dimension; F logistic, s = exp(log_scale).

    x is one of `levels` values evenly spaced on [-1, 1], h half their distance; the lowest level takes all mass
    below it and the highest all above (Salimans et al. 2017, PixelCNN++), so the levels' probabilities sum to 1.
    Evaluated without subtracting two rounded F's.

    Args:
        mean, log_scale: (*batch, *event), float32 or float64; log_scale is floored at -7.
        event_dims: trailing dimensions of one x.
    """

    def __init__(
        self, mean: Tensor, log_scale: Tensor, event_dims: int, levels: int = 256, validate_args: bool = True
    ) -> None:
        self.levels = levels
        cut = mean.ndim - event_dims
        parameters = (mean, log_scale.clamp_min(LOG_SCALE_FLOOR))
        super().__init__("discretized_logistic", mean.shape[:cut], mean.shape[cut:], parameters, validate_args)

    @property
    def location(self) -> Tensor:
        """The logistic's own mean, which may lie outside [-1, 1]."""
        return self.parameters[0]

    @property
    def log_scale(self) -> Tensor:
        return self.parameters[1]

    @property
    def mean(self) -> Tensor:
        """The expected x, within [-1, 1]: (*batch, *event)."""
        # E x = 1 - (2 / (levels - 1)) sum of P(level <= v) over all levels v but the highest
        rate, gap = (-self.log_scale).exp(), 2 / (self.levels - 1)
        below = torch.zeros_like(self.location)
        for level in range(self.levels - 1):
            below = below + ((-1 + (level + 0.5) * gap - self.location) * rate).sigmoid()
        return 1 - gap * below

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Levels in [-1, 1]: (*sample_shape, *batch, *event)."""
        location = self.location
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=location.dtype, device=location.device)
            edge = torch.finfo(location.dtype).eps
            drawn = location + self.log_scale.exp() * uniform.clamp(edge, 1 - edge).logit()
            return self._level(drawn.clamp(-1, 1)) * (2 / (self.levels - 1)) - 1

    def _level(self, x: Tensor) -> Tensor:
        return ((x + 1) * ((self.levels - 1) / 2)).round()

    def _check_data(self, x: Tensor) -> None:
        self._check_range(x, -1, 1, "is outside [-1, 1]")
        offset = (x + 1) * ((self.levels - 1) / 2)
        bad = (offset - offset.round()).abs() > 0.01
        self._reject(x, bad, f"is none of the {self.levels} levels 2 v / {self.levels - 1} - 1")

    def _total(self, x: Tensor) -> Tensor:
        mean, log_scale = self.parameters
        batch = x.shape[: x.ndim - len(self.event_shape)]
        # x (B, *event) meets means (S, B, *event) as it is: it is not repeated for every sample of z
        if batch != self.batch_shape[len(self.batch_shape) - len(batch) :]:
            whole = torch.broadcast_shapes(batch, self.batch_shape) + self.event_shape
            mean, log_scale, x = mean.expand(whole), log_scale.expand(whole), x.expand(whole)
        elif not batch and self.batch_shape:
            x = x[None]  # one x for the whole batch
        batch_dims = mean.ndim - len(self.event_shape)
        return discretized_logistic_log_prob(x, mean, log_scale, self.levels, batch_dims=batch_dims)


class DiscretizedLogistic(Likelihood):
    """x on `levels` even levels of [-1, 1]; the decoder gives means, then log scales: (N, 2 * C, ...).

    Raises:
        ValueError: fewer than two levels.
    """

    name = "discretized_logistic"
    channels = 2
    data: Literal["unit", "symmetric", "integer"] = "symmetric"

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"DiscretizedLogistic: levels is {levels}, expected at least 2")
        self.levels = levels

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def forward(self, parameters: Tensor, event_dims: int) -> DiscretizedLogisticDistribution:
        mean, log_scale = self.split(parameters, event_dims).unbind(-event_dims - 1)
        return DiscretizedLogisticDistribution(mean, log_scale, event_dims, self.levels, self.validate_args)
