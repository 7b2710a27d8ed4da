"""Which rows of a batch a loss is about: their mask, a random share of them, the mean over them; shapes stay fixed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def flat_mask(layer: nn.Module, mask: Tensor, x: Tensor) -> Tensor:
    """The mask of x (B, ..., D), bool of shape (B, ...) or (B, N), as (B N,).

    Raises:
        ValueError: it has another shape. TypeError: it is not bool.
    """
    name = type(layer).__name__
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask is {mask.dtype}, expected torch.bool")
    shape = tuple(x.shape[:-1])
    flat = (shape[0], math.prod(shape[1:]))
    if tuple(mask.shape) not in (shape, flat):
        expected = f"{shape}" if shape == flat else f"{shape} or {flat}"
        raise ValueError(f"{name}: mask is {tuple(mask.shape)}, expected {expected}")
    return mask.reshape(-1)


def random_share(rows: Tensor | None, count: int, share: float, device: torch.device) -> Tensor:
    """floor(share V) of the V rows that count, drawn by torch's generator, as bool (N,).

    rows: bool (N,), those that count, or None for all N = `count`.
    """
    places = torch.randn(count, device=device).argsort()
    if rows is None:
        return places < int(count * share)
    # The rows in another order, the inverse of `places`, of which the first that count are taken.
    counting = rows[places.argsort()]
    wanted = (rows.sum().to(torch.float64) * share).floor()
    return (counting & (counting.cumsum(0) <= wanted))[places]


def mean_square(difference: Tensor, rows: Tensor | None) -> Tensor:
    """The mean over (..., D), over the rows that count; a scalar, 0 where there are none.

    rows: bool, broadcasting to (...), or None for all; what the others hold does not matter.
    """
    if rows is None:
        return difference.square().sum() / max(difference.numel(), 1)
    rows = rows.expand(difference.shape[:-1])
    visible = torch.where(rows[..., None], difference, 0.0)
    return visible.square().sum() / (rows.sum() * difference.shape[-1]).clamp(min=1)
