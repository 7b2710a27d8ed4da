"""p(z): what is assumed of the latents before any x is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

__all__ = ["StandardNormal", "UniformCodes", "build"]


class _Prior(Distribution):
    """Batch shape () and an event shape, until expanded."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(torch.Size(), torch.Size(event_shape), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        new: Self = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def _batch_of(self, z: Tensor) -> torch.Size:
        cut = z.ndim - len(self.event_shape)
        if cut < 0 or z.shape[cut:] != self.event_shape:
            raise ValueError(
                f"{type(self).__name__}.log_prob: z is {tuple(z.shape)}, expected (..., "
                f"{', '.join(map(str, self.event_shape))})"
            )
        return torch.broadcast_shapes(z.shape[:cut], self.batch_shape)


class StandardNormal(_Prior):
    """N(0, I) over z of `event_shape`; `log_prob` in nats, summed over the event.

    dtype, device: of its samples; `log_prob` keeps those of z.
    """

    has_rsample = True

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(event_shape)
        self._like = torch.empty((), dtype=dtype, device=device)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return self._like.new_zeros(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        return self._like.new_ones(self._extended_shape())

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """z: (*sample_shape, *event)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.randn(shape, dtype=self._like.dtype, device=self._like.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z): (*batch, *event) -> (*batch,)."""
        batch = self._batch_of(value)
        squares = value.double() if value.device.type == "cpu" else value
        total = squares.square().sum(tuple(range(-len(self.event_shape), 0)))
        constant = math.prod(self.event_shape) * math.log(2 * math.pi)
        return (-0.5 * (total + constant)).to(value.dtype).expand(batch)

    def entropy(self) -> Tensor:
        value = 0.5 * math.prod(self.event_shape) * (1 + math.log(2 * math.pi))
        return self._like.new_full(tuple(self.batch_shape), value)


class UniformCodes(_Prior):
    """Every code of every position of `grid` equally likely: p(z) = num_codes^-positions.

    z: int64 (*grid), codes 0 .. num_codes - 1; `log_prob` in nats, float32, -inf where a code is out of range.

    Raises:
        ValueError: num_codes is not positive.
    """

    def __init__(self, num_codes: int, grid: Sequence[int], *, device: torch.device | str | None = None) -> None:
        if num_codes < 1:
            raise ValueError(f"UniformCodes: num_codes is {num_codes}, expected at least 1")
        super().__init__(grid)
        self.num_codes, self.grid, self._device = num_codes, tuple(grid), device

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.num_codes - 1), len(self.event_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """z: int64 (*sample_shape, *grid)."""
        return torch.randint(self.num_codes, self._extended_shape(torch.Size(sample_shape)), device=self._device)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z): int64 (*batch, *grid) -> (*batch,)."""
        batch = self._batch_of(value)
        valid = ((value >= 0) & (value < self.num_codes)).flatten(value.ndim - len(self.grid)).all(-1)
        inside = torch.full((), -math.prod(self.grid) * math.log(self.num_codes), device=value.device)
        return torch.where(valid, inside, -torch.inf).expand(batch)

    def entropy(self) -> Tensor:
        return torch.full(tuple(self.batch_shape), math.prod(self.grid) * math.log(self.num_codes), device=self._device)


def build(prior: str | Distribution, event_shape: Sequence[int], **options: Any) -> Distribution:
    """The prior of that name over z of `event_shape`, or the given one when its event shape is that.

    `build("normal", (16,))`, `build("uniform", (7, 7), num_codes=256)`; dtype= and device= are options.

    Raises:
        ValueError: no such name, or a given prior over another shape.
    """
    if isinstance(prior, Distribution):
        if tuple(prior.event_shape) != tuple(event_shape):
            raise ValueError(
                f"priors.build: the prior's event shape is {tuple(prior.event_shape)}, "
                f"expected {tuple(event_shape)}, the shape of z"
            )
        return prior
    if prior == "normal":
        return StandardNormal(event_shape, **options)
    if prior == "uniform":
        return UniformCodes(grid=event_shape, **options)
    raise ValueError(f"priors.build: {prior!r} is unknown, expected 'normal' or 'uniform'")
