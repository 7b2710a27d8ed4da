"""`torch.vmap` and second derivatives for log-likelihoods that need no rule of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops._registry import Operation


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

    operation.register_vmap(rule)


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
