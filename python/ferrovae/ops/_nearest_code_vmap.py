"""vmap of `nearest_code` and its distances: one larger call instead of one for each element of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def nearest_code_vmap(operation: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """The rule for an operation of x [H, N, D], codebook [H, K, D] and perhaps indices [H, N, k] -> [H, N, k].

    One codebook for the whole batch: its rows are more rows. One each: they are more heads.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        constants = args[len(tensors) :]
        shared = in_dims[1] is None
        x, codebook, *indices = (
            tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
            for tensor, axis in zip(tensors, in_dims, strict=False)
        )
        heads = x.shape[1]
        if shared:
            of_rows = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (x, *indices))
            rows, *chosen = of_rows
            found = operation(rows, codebook[0], *chosen, *constants)
            return found.unflatten(1, (size, -1) if rows.shape[1] else (size, 0)).transpose(0, 1), 0
        found = operation(*(tensor.flatten(0, 1) for tensor in (x, codebook, *indices)), *constants)
        return found.unflatten(0, (size, heads)), 0

    return rule
