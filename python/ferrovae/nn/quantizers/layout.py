"""Where the channels of a quantizer's input stand, and how heads share them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import check_floating, require


class Layout(NamedTuple):
    """Sequences (B, N, C), or (B, C, N) without `channel_last`, single vectors (B, C), images, volumes."""

    dim: int
    channel_last: bool = True
    accept_image_fmap: bool = False
    accept_3d_fmap: bool = False

    def to_channel_last(self, layer: nn.Module | str, x: Tensor) -> Tensor:
        """x to (B, ..., C); `ValueError` or `TypeError` led by the layer's name if it does not fit."""
        axis = self._axis(x.ndim)
        require(
            layer,
            self._ndim_fits(x.ndim) and x.shape[axis] == self.dim,
            f"x is {tuple(x.shape)}, expected {self._expected()}",
        )
        check_floating(layer, "x", x)
        return x.movedim(axis, -1)

    def from_channel_last(self, tokens: Tensor, *, single: bool = False) -> Tensor:
        """(B, ..., C) to the layout of x; further axes, as of the k nearest codes, come last.

        single: x is (B, C), which no layout moves.
        """
        return tokens if single else tokens.movedim(-1, self._axis(tokens.ndim))

    @property
    def _is_map(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap

    def _axis(self, ndim: int) -> int:
        return -1 if ndim == 2 or (self.channel_last and not self._is_map) else 1

    def _ndim_fits(self, ndim: int) -> bool:
        if self._is_map:
            return ndim == (4 if self.accept_image_fmap else 5)
        return ndim >= 2 if self.channel_last else ndim in (2, 3)

    def _expected(self) -> str:
        if self.accept_image_fmap:
            return f"(B, {self.dim}, H, W)"
        if self.accept_3d_fmap:
            return f"(B, {self.dim}, depth, H, W)"
        return f"(B, {self.dim}) or " + (f"(B, N, {self.dim})" if self.channel_last else f"(B, {self.dim}, N)")


class Heads(NamedTuple):
    """C = heads x D channels as rows for the codebooks: one for all heads, or one for each.

    Rows are (1, B N heads, D) for a shared codebook, (heads, B N, D) for separate ones.
    """

    heads: int
    separate: bool

    def split(self, tokens: Tensor) -> Tensor:
        """(B, ..., heads D) -> rows."""
        dim = tokens.shape[-1] // self.heads
        if not (self.separate and self.heads > 1):
            return tokens.reshape(1, -1, dim)
        return tokens.reshape(-1, self.heads, dim).transpose(0, 1).contiguous()

    def merge(self, rows: Tensor, grid: torch.Size) -> Tensor:
        """Rows (with further axes before D) -> (*grid, ..., heads D)."""
        if self.heads == 1:
            return rows.reshape(*grid, *rows.shape[2:])
        if self.separate:
            rows = rows.transpose(0, 1)
        return rows.reshape(*grid, self.heads * rows.shape[-1])

    def split_values(self, values: Tensor) -> Tensor:
        """Values of tokens and heads, (B, ..., heads), or (B, ...) with one head, as rows without D."""
        if not (self.separate and self.heads > 1):
            return values.reshape(1, -1)
        return values.reshape(-1, self.heads).transpose(0, 1)

    def split_mask(self, mask: Tensor) -> Tensor:
        """What holds for a token holds for its heads: (B, ...) -> rows without D."""
        return self.split_values(mask[..., None].expand(*mask.shape, self.heads))

    def merge_values(self, values: Tensor, grid: torch.Size) -> Tensor:
        """Rows without D -> (*grid, heads), or (*grid) with one head; further axes follow."""
        if self.heads == 1:
            return values.reshape(*grid, *values.shape[2:])
        if self.separate:
            values = values.transpose(0, 1)
        return values.reshape(*grid, self.heads)


def visible_tokens(layer: str, tokens: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
    """Which tokens (B, ..., C) are no padding: bool (B, ...), or None for all; from a mask or the sequences' lengths.

    Raises:
        ValueError: both are given, the mask does not lead the tokens' shape, or lens is not (B,).
        TypeError: the mask is not bool.
    """
    grid = tokens.shape[:-1]
    require(layer, mask is None or lens is None, "mask and lens are both given, expected one of them")
    if lens is not None:
        fits = tokens.ndim >= 3 and tuple(lens.shape) == (tokens.shape[0],)
        require(layer, fits, f"lens is {tuple(lens.shape)}, expected ({tokens.shape[0]},), one for each sequence")
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"{layer}: mask is {mask.dtype}, expected torch.bool")
    require(
        layer,
        1 <= mask.ndim <= len(grid) and mask.shape == grid[: mask.ndim],
        f"mask is {tuple(mask.shape)}, expected {tuple(grid)} to match x {tuple(tokens.shape)} (channels last)",
    )
    return mask.reshape(*mask.shape, *(1 for _ in grid[mask.ndim :])).expand(grid)
