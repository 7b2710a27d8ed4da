"""Grids of different resolution over one feature map: how it is pooled to them, and filled from them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ferrovae.nn.quantizers.checks import require

_POOLS: tuple[Callable[[Tensor, Any], Tensor], ...] = (
    functional.adaptive_avg_pool1d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
)
_MODES = ("linear", "bilinear", "trilinear")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def level_shape(layer: nn.Module | str, scale: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """A scale as one size for each axis; `ValueError` unless all are positive."""
    shape = (scale,) * axes if isinstance(scale, int) else tuple(scale)
    fits = len(shape) == axes and all(size >= 1 for size in shape)
    require(layer, fits, f"scale {scale} expected a positive size, or {axes} of them")
    return shape


def pool_to(x: Tensor, shape: Sequence[int], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Means of x (B, C, *grid) over the cells of a grid, of the visible positions only.

    mask: bool (B, *grid), or None for all. Returns (B, C, *shape), 0 where a cell has no visible position, and which
    cells have one: bool (B, *shape), or None.
    """
    pool = _POOLS[len(shape) - 1]
    if mask is None:
        return pool(x, tuple(shape)), None
    seen = mask[:, None].to(x.dtype)
    share = pool(seen, tuple(shape))
    total = pool(torch.where(mask[:, None], x, 0.0), tuple(shape))
    held = share > 0
    return torch.where(held, total / torch.where(held, share, 1.0), 0.0), held[:, 0]


def resize(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x (B, C, *grid) interpolated linearly to another grid."""
    if tuple(x.shape[2:]) == tuple(shape):
        return x
    return functional.interpolate(x, size=tuple(shape), mode=_MODES[len(shape) - 1], align_corners=False)


class ResidualConvolution(nn.Module):
    """phi(x) = (1 - r) x + r conv(x), a 3-wide convolution (VAR, Tian et al., 2024, arXiv:2404.02905, appendix).

    Args:
        dim: channels. axes: 1, 2 or 3. ratio: |r|; 0 is the identity.
    """

    def __init__(self, dim: int, axes: int, ratio: float) -> None:
        super().__init__()
        self.conv = _CONVOLUTIONS[axes - 1](dim, dim, 3, padding=1)
        self.resi_ratio = abs(float(ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *grid) -> the same."""
        return x if self.resi_ratio <= 1e-8 else x.lerp(self.conv(x).to(x.dtype), self.resi_ratio)
