"""Batch and event dimensions of the log-likelihoods: x meets parameters that may have more leading dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks
from ferrovae.ops._registry import Operation, library


def batch(operation: str, batch_dims: int, most: int, other_name: str, other: Tensor) -> None:
    """A number of batch dimensions that `other` can have, or `ValueError`."""
    if not 0 <= batch_dims <= most:
        raise ValueError(
            f"{operation}: batch_dims is {batch_dims}, expected 0 to {most} for {other_name} {_checks.shape(other)}"
        )


def data(operation: str, x: Tensor, whole: torch.Size, batch_dims: int, other_name: str) -> Tensor:
    """x without leading dimensions of size 1 that the parameters do not have.

    `whole` is the shape that x would have with all batch dimensions, as `other_name` has them.
    """
    if batch_dims and x.shape == whole:
        return x
    given, extra = x, len(whole) - x.ndim
    missing_too_many = extra > max(batch_dims - 1, 0)
    while 0 <= extra < batch_dims and x.shape[0] == 1 != whole[extra]:
        x, extra = x[0], extra + 1
    if extra < 0 or missing_too_many or x.shape != whole[extra:]:
        raise ValueError(
            f"{operation}: x is {_checks.shape(given)}, expected {tuple(whole)} to match {other_name}; of the "
            f"{batch_dims} batch dimensions leading ones may be 1, all but one may be missing"
        )
    return x


def work(tensor: Tensor) -> torch.dtype:
    """What is computed in, and the result's dtype."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def total(values: Tensor, batch_dims: int) -> Tensor:
    """The sum over all but the batch dimensions."""
    if values.ndim == batch_dims:
        return values
    exact = torch.float64 if values.device.type == "cpu" else values.dtype
    return values.sum(tuple(range(batch_dims, values.ndim)), dtype=exact).to(values.dtype)


def columns(per_example: Tensor, like: Tensor) -> Tensor:
    """`(N,)` as `(N, 1, ...)`, to multiply with `like`."""
    return per_example.reshape(per_example.shape + (1,) * (like.ndim - per_example.ndim))


def unexpanded(x: Tensor) -> Tensor:
    """x without the leading dimensions it is expanded over."""
    while x.ndim and x.shape[0] > 1 and x.stride(0) == 0:
        x = x[0]
    return x


def register_vmap(operation: Operation, parameters: int) -> None:
    """`torch.vmap` as one more batch dimension.

    The operation's arguments are `parameters` tensors with all batch dimensions, x, other tensors with all batch
    dimensions, numbers of which the last is `batch_dims`, and the backend.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        *given, batch_dims, backend = args

        def front(value: Tensor, dim: int | None) -> Tensor:
            return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)

        moved = [front(v, d) if isinstance(v, Tensor) else v for v, d in zip(given, in_dims, strict=False)]
        x, dim, first = given[parameters], in_dims[parameters], moved[0]
        if dim is None:
            moved[parameters] = x
        else:
            own, missing = moved[parameters], given[0].ndim - (in_dims[0] is not None) - (x.ndim - 1)
            own = own.reshape(info.batch_size, *(1,) * missing, *own.shape[1:])
            moved[parameters] = own.expand(*first.shape[: 1 + missing], *own.shape[1 + missing :])
        results = operation(*moved, batch_dims + 1, backend=backend)
        return results, tuple(0 for _ in results) if isinstance(results, tuple) else 0

    torch.library.register_vmap(f"ferrovae::{operation.name}", rule, lib=library)


def differentiate_again(slopes: Callable[..., Any], inputs: tuple[Tensor, ...], outer: tuple[Tensor, ...]) -> Any:
    """The gradients of sum(outer * slopes(*inputs)) in the inputs that need one; differentiable themselves."""
    with torch.enable_grad():
        # Of aliases: a gradient stops at its inputs, not at what they were computed from.
        leaves = tuple(value.view_as(value) if value.requires_grad else value for value in inputs)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        results = slopes(*leaves)
        if not wanted:
            return [None] * len(leaves)
        found = iter(torch.autograd.grad(results, wanted, outer, create_graph=True, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]
