"""What every p(x|z) shares: the module that owns parameters, and the distribution it makes of a decoder's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

__all__ = ["Factorized", "Likelihood"]


def single(tensor: Tensor) -> Tensor:
    """At least float32: a likelihood is never evaluated in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def wide(tensor: Tensor) -> Tensor:
    """float64 on a CPU, where it is cheap; elsewhere at least float32."""
    return tensor.double() if tensor.device.type == "cpu" else single(tensor)


def first_example(bad: Tensor, event_dims: int) -> str:
    """Name the first example with a true element in `bad` (*batch, *event): `example 3`, or `example (0, 3)`."""
    batch = bad.ndim - event_dims
    position = bad.nonzero()[0, :batch].tolist()
    return f"example {position[0] if batch == 1 else tuple(position)}" if batch else "it"


class Factorized(Distribution):
    """p(x|z) with independent dimensions: `log_prob` is summed over the event dimensions, in nats.

    Subclasses give `_log_prob` (per element) and `_check_data`. The tensors of `parameters` have the batch
    dimensions first, or none at all; x broadcasts against them, so that x (B, *event) meets parameters
    (S, B, *event) without being repeated.

    Args:
        name: who speaks in an error message.
        batch_shape, event_shape: of the distribution; `event_shape` is the shape of one x.
        validate_args: check x in `log_prob`; never done inside `torch.compile`. (Torch's own default is not asked:
            compiling anything switches it off for the whole process.)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        name: str,
        batch_shape: Sequence[int],
        event_shape: Sequence[int],
        parameters: Sequence[Tensor],
        validate_args: bool = True,
    ) -> None:
        self.name = name
        self.parameters, self.validate_args = tuple(parameters), validate_args
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """The same distribution with a larger batch shape; nothing is copied."""
        batch_shape, batch = torch.Size(batch_shape), len(self.batch_shape)
        new: Self = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.parameters = tuple(p.expand(batch_shape + p.shape[batch:]) if p.ndim else p for p in self.parameters)
        new._batch_shape = batch_shape
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value|z) in nats, summed over the event: value (*batch, *event) -> (*batch,).

        Raises `ValueError` when the shape does not fit, or, where arguments are validated, when a value is NaN or
        outside the support; the message names the first such example.
        """
        self._check_shape(value)
        if self.validate_args and not torch.compiler.is_compiling() and value.numel():
            self._check_data(value)
        return self._total(value)

    def _total(self, x: Tensor) -> Tensor:
        return wide(self._log_prob(x)).sum(tuple(range(-len(self.event_shape), 0))).to(self.dtype)

    def _matched(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """x and the batch shape of parameters that it meets in an operation, which takes x (B, *event) beside
        parameters (S, B, *event) as it is: it is not repeated for every sample of z."""
        batch = x.shape[: x.ndim - len(self.event_shape)]
        if batch != self.batch_shape[len(self.batch_shape) - len(batch) :]:
            whole = torch.broadcast_shapes(batch, self.batch_shape)
            return x.expand(whole + self.event_shape), whole
        if not batch and self.batch_shape:
            x = x[None]  # one x for the whole batch
        return x, self.batch_shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `log_prob`: float64 for float64 parameters, else float32."""
        return self.parameters[0].dtype

    def _log_prob(self, x: Tensor) -> Tensor:
        """Per element, broadcast over batch dimensions."""
        raise TypeError(f"{type(self).__name__} does not say its log-probability per element")

    def _check_data(self, x: Tensor) -> None:
        """Raise `ValueError` when x lies outside the support."""
        if x.is_floating_point() and not bool(x.sum().isfinite()):
            self._reject_nan(x)

    def _check_shape(self, x: Tensor) -> None:
        dims = len(self.event_shape)
        if x.ndim < dims or x.shape[x.ndim - dims :] != self.event_shape:
            raise ValueError(
                f"{self.name}: x is {tuple(x.shape)}, expected (..., {', '.join(map(str, self.event_shape))}) "
                "to match the parameters"
            )

    def _reject(self, x: Tensor, bad: Tensor, what: str) -> None:
        """Raise for the first example with an element in `bad`, if there is one."""
        if bool(bad.any()):
            value = x[bad][0].item()
            where = first_example(bad, len(self.event_shape))
            raise ValueError(f"{self.name}: {where} of x holds {value:g}, which {what}")

    def _reject_nan(self, x: Tensor) -> None:
        bad = x.isnan()
        if bool(bad.any()):
            raise ValueError(f"{self.name}: {first_example(bad, len(self.event_shape))} of x holds NaN")

    def _check_range(self, x: Tensor, low: float, high: float, what: str) -> None:
        """One pass over good data: aminmax hands a NaN on."""
        least, most = torch.aminmax(x)
        if not bool((least >= low) & (most <= high)):
            if x.is_floating_point():
                self._reject_nan(x)
            self._reject(x, (x < low) | (x > high), what)


class Likelihood(nn.Module):
    """A family of p(x|z): turns a decoder's output into a distribution over x, and owns what is shared by all z.

    Attributes:
        name: the name `build` knows it by.
        channels: parameters per channel of data, stacked along dim 1 of the decoder's output: for data (C, H, W)
            the output is (N, channels * C, H, W), parameter 0 of all channels first.
        data: the x it wants: `"unit"` ([0, 1]), `"symmetric"` ([-1, 1]) or `"integer"` (0 .. classes - 1).
        validate_args: whether its distributions check x, which makes a GPU wait.
    """

    name: str
    channels: int = 1
    data: Literal["unit", "symmetric", "integer"] = "unit"
    validate_args: bool = True

    def forward(self, parameters: Tensor, event_dims: int) -> Factorized:
        """The distribution with these parameters.

        parameters: (*batch, channels * C, ...), `event_dims` trailing dimensions belong to one x; half precision
        is evaluated in float32, float64 stays float64.
        """
        raise TypeError(f"{type(self).__name__} does not define forward(parameters, event_dims)")

    def split(self, parameters: Tensor, event_dims: int) -> Tensor:
        """(*batch, channels * C, ...) -> (*batch, channels, C, ...), in float32 or float64."""
        if event_dims < 1 or parameters.ndim < event_dims:
            raise ValueError(
                f"{self.name}: event_dims is {event_dims}, expected 1..{parameters.ndim} "
                f"for parameters {tuple(parameters.shape)}"
            )
        size = parameters.shape[-event_dims]
        if size % self.channels:
            raise ValueError(
                f"{self.name}: parameters are {tuple(parameters.shape)} with {size} channels, "
                f"expected a multiple of {self.channels} ({self.channels} parameters for every channel of x)"
            )
        return single(parameters).unflatten(-event_dims, (self.channels, size // self.channels))

    def features(self, x: Tensor) -> Tensor:
        """What an encoder is shown of x: floating point, and integer levels mapped to [-1, 1]."""
        return x if x.is_floating_point() else x.to(torch.get_default_dtype())

    def scalars(self) -> dict[str, Tensor]:
        """What is worth logging of its state, such as a learned sigma; detached."""
        return {}
