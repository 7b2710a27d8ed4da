"""What the log-likelihoods share: how x and the parameters meet, what is summed, in which precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks


def checked(operation: str, x: Any, name: str, parameter: Any, batch_dims: int) -> Tensor:
    """x without leading dimensions of size 1 that the first parameter, called `name`, does not have."""
    for label, value in (("x", x), (name, parameter)):
        _checks.tensor(operation, label, value)
    verb = "are" if name.endswith("s") else "is"
    if parameter.dtype not in _checks.FLOATS:
        raise TypeError(f"{operation}: {name} {verb} {parameter.dtype}, expected float32, float64, float16 or bfloat16")
    if x.dtype.is_complex:
        raise TypeError(f"{operation}: x is {x.dtype}, expected bool, integers or floating point")
    if x.device != parameter.device:
        raise ValueError(f"{operation}: x is on {x.device}, expected {parameter.device}, where {name} {verb}")
    check_batch_dims(operation, batch_dims, parameter.ndim, name, parameter)
    return meeting(operation, x, parameter.shape, batch_dims, name)


def check_batch_dims(operation: str, batch_dims: int, most: int, name: str, parameter: Tensor) -> None:
    """A number of batch dimensions that the parameter called `name` can have, or `ValueError`."""
    if not 0 <= batch_dims <= most:
        raise ValueError(
            f"{operation}: batch_dims is {batch_dims}, expected 0 to {most} for {name} {_checks.shape(parameter)}"
        )


def meeting(operation: str, x: Tensor, shape: torch.Size, batch_dims: int, name: str) -> Tensor:
    """x without leading dimensions of size 1 that `shape` does not have: its own, with the batch of `name`."""
    squeezed = fitting(x, shape, batch_dims)
    if squeezed is None:
        raise ValueError(
            f"{operation}: x is {_checks.shape(x)}, expected {tuple(shape)} to match {name}; of the "
            f"{batch_dims} batch dimensions leading ones may be 1, all but one may be missing"
        )
    return squeezed


def fitting(x: Tensor, shape: torch.Size, batch_dims: int) -> Tensor | None:
    """x without leading batch dimensions that are 1 and not `shape`'s; None where it does not fit."""
    if x.shape == shape:
        return x
    extra = len(shape) - x.ndim
    if extra > max(batch_dims - 1, 0):
        return None
    while 0 <= extra < batch_dims and x.shape[0] == 1 != shape[extra]:
        x, extra = x[0], extra + 1
    return None if extra < 0 or x.shape != shape[extra:] else x


def work_dtype(parameter: Tensor) -> torch.dtype:
    """The result's dtype, and what is computed in at least."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def sum_events(values: Tensor, batch_dims: int) -> Tensor:
    """Summed over all but the first `batch_dims` dimensions, in float64 on a CPU."""
    if values.ndim == batch_dims:
        return values
    exact = torch.float64 if values.device.type == "cpu" else values.dtype
    return values.sum(tuple(range(batch_dims, values.ndim)), dtype=exact).to(values.dtype)


def as_columns(per_example: Tensor, like: Tensor) -> Tensor:
    """`(N,)` as `(N, 1, ...)`, to multiply with `like`."""
    return per_example.reshape(per_example.shape + (1,) * (like.ndim - per_example.ndim))


def sum_to(values: Tensor, like: Tensor) -> Tensor:
    """Summed over the dimensions that `like` does not have, or has as 1; of its dtype."""
    extra = values.ndim - like.ndim
    dims = [*range(extra), *(extra + i for i, size in enumerate(like.shape) if size == 1 != values.shape[extra + i])]
    return (values.sum(dims) if dims else values).reshape(like.shape).to(like.dtype)


def unexpanded(value: Tensor) -> Tensor:
    """Without the leading dimensions it is expanded over."""
    while value.ndim and value.shape[0] > 1 and value.stride(0) == 0:
        value = value[0]
    return value
