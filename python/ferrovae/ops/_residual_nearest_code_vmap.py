"""`torch.vmap` over `residual_nearest_code` and its gradient: a mapped dimension becomes more rows, or more groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ferrovae.ops._registry import operations


def _folded(value: Tensor, mapped: int | None, size: int, into: int) -> Tensor:
    """The mapped dimension (or `size` times the same) folded into dimension `into`, as the slower of the two."""
    if mapped is None:
        value = value.unsqueeze(into).expand(*value.shape[:into], size, *value.shape[into:])
    else:
        value = value.movedim(mapped, into)
    return value.flatten(into, into + 1)


def _forward(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Rows of the same codebooks side by side; with codebooks of their own, groups of their own."""
    size = info.batch_size
    x, codebooks, stages, *others = inputs
    into = 1 if in_dims[1] is None else 0
    if into == 0:
        codebooks = _folded(codebooks, in_dims[1], size, 0)
    if stages is not None:
        stages = _folded(stages, in_dims[2], size, into)
    results = operations["residual_nearest_code"].on(_folded(x, in_dims[0], size, into), codebooks, stages, *others)
    return tuple(result.unflatten(into, (size, result.shape[into] // size)) for result in results), (into,) * 3


def _backward(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """A gradient for every mapped element: groups of their own."""
    size = info.batch_size
    *tensors, codes, backend = inputs
    folded = [_folded(value, mapped, size, 0) for value, mapped in zip(tensors, in_dims, strict=False)]
    result = operations["residual_nearest_code_backward"].on(*folded, codes, backend)
    return result.unflatten(0, (size, result.shape[0] // size)), 0


def register_vmap() -> None:
    """Register both rules; the operations are defined by now."""
    operations["residual_nearest_code"].register_vmap(_forward)
    operations["residual_nearest_code_backward"].register_vmap(_backward)
