"""Discretised logistic likelihood: the logistic's mass on each of some evenly spaced levels of [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ferrovae.likelihoods.base import Factorized, Likelihood

__all__ = ["DiscretizedLogistic", "DiscretizedLogisticDistribution"]

LOG_SCALE_FLOOR = -7.0


class DiscretizedLogisticDistribution(Factorized):
    """p(x|z) = F((x + h - mean) / s) - F((x - h - mean) / s) per dimension; F logistic, s = exp(log_scale).

    x is one of `levels` values evenly spaced on [-1, 1], h half their distance; the lowest level takes all mass
    below it and the highest all above (Salimans et al. 2017, PixelCNN++), so the levels' probabilities sum to 1.
    Evaluated without subtracting two rounded F's: right to float precision from log_scale -7 upwards.

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

    def _log_prob(self, x: Tensor) -> Tensor:
        mean, log_scale, top = self.location, self.log_scale, self.levels - 1
        level = self._level(x.to(mean.dtype))
        # x as a rounded head and the tail it lost: at scale exp(-7) the rounding alone would cost 3e-5 nats
        exact = (2 * level - top).to(torch.float32 if mean.device.type == "mps" else torch.float64) / top
        head = exact.to(mean.dtype)
        distance = (head - mean) + (exact - head).to(mean.dtype)
        rate = (-log_scale).exp()
        below = functional.logsigmoid((distance + 1 / top) * rate)  # log F(upper edge)
        above = functional.logsigmoid((1 / top - distance) * rate)  # log (1 - F(lower edge))
        lowest, highest = level == 0, level == top
        inside = torch.where(lowest | highest, torch.zeros_like(rate), self._log_width(rate))
        return below.masked_fill(highest, 0) + above.masked_fill(lowest, 0) + inside

    def _log_width(self, rate: Tensor) -> Tensor:
        """log(1 - exp(-t)) for the width t of a level in scales; a series where t is small and the rest would round."""
        width = rate * (2 / (self.levels - 1))
        small = width < 1e-3
        series = (width.new_tensor(2 / (self.levels - 1)).log() - self.log_scale) - width / 2 + width.square() / 24
        return torch.where(small, series, (-torch.expm1(-width.clamp_min(1e-3))).log())


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
