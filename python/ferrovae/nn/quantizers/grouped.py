"""What grouped residual quantizers share: each group of channels has a residual stack of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import check_channels, check_floating, require
from ferrovae.nn.quantizers.quantizer_dropout import QuantizerDropout


class GroupedResidual(nn.Module):
    """G residual stacks side by side, each over D / G of the channels (HiFi-Codec, arXiv:2305.02765).

    A stack sees tokens, (B, N, D / G), whatever the layout around it: images are flattened here and restored here.

    Args:
        dim: D, the channels of x.
        groups: G.
        accept_image_fmap: x is (B, D, H, W).
        make: given D / G, one residual stack.
        channel_first: the stacks take (B, D / G, ...) as it is, and give their results in that layout.

    Raises:
        ValueError: G does not divide D.
    """

    def __init__(
        self,
        dim: int,
        groups: int,
        accept_image_fmap: bool,
        make: Callable[[int], QuantizerDropout],
        *,
        channel_first: bool = False,
    ) -> None:
        super().__init__()
        require(
            self, groups >= 1 and dim % groups == 0, f"dim is {dim} and groups {groups}, expected groups to divide dim"
        )
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        self._flattens = accept_image_fmap and not channel_first
        self._channel_first = channel_first
        self.rvqs = nn.ModuleList([make(dim // groups) for _ in range(groups)])

    @property
    def codebooks(self) -> Tensor:
        """The codebooks of all groups, (G, Q, K, codebook_dim)."""
        return torch.stack([rvq.codebooks for rvq in self._stacks()])

    @property
    def split_dim(self) -> int:
        """The axis of x that holds the channels."""
        return 1 if self.accept_image_fmap or self._channel_first else -1

    def get_codes_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The code of every stage: indices (G, B, ..., Q) -> (G, Q, B, ..., codebook_dim)."""
        self._check_groups(indices)
        return torch.stack(
            [rvq.get_codes_from_indices(part) for rvq, part in zip(self._stacks(), indices, strict=True)]
        )

    def get_output_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """What `forward` gives for these indices in eval mode, laid out as x."""
        self._check_groups(indices)
        parts = [rvq.get_output_from_indices(part) for rvq, part in zip(self._stacks(), indices, strict=True)]
        if self._channel_first:
            return torch.cat(parts, dim=1)
        return torch.cat(parts, dim=-1).movedim(-1, self.split_dim)

    def split(self, x: Tensor) -> tuple[Sequence[Tensor], tuple[int, ...] | None]:
        """Each group's part of x, and the grid (H, W) that `join` and `stack` restore; None where nothing is flat."""
        expected = f"(..., {self.dim})"
        if self._flattens:
            expected = f"(B, {self.dim}, H, W)"
            require(self, x.ndim >= 3, f"x is {tuple(x.shape)}, expected {expected}")
        elif self.split_dim == 1:
            expected = f"(B, {self.dim}, ...)"
        check_channels(self, x, self.dim, self.split_dim, expected)
        check_floating(self, "x", x)
        if not self._flattens:
            return x.chunk(self.groups, dim=self.split_dim), None
        return x.flatten(2).mT.chunk(self.groups, dim=-1), tuple(x.shape[2:])

    def join(self, parts: Sequence[Tensor], grid: tuple[int, ...] | None) -> Tensor:
        """The groups' quantized parts as one tensor, laid out as x."""
        if grid is None:
            return torch.cat(list(parts), dim=self.split_dim)
        return torch.cat(list(parts), dim=-1).mT.unflatten(2, grid)

    def stack(self, parts: Sequence[Tensor], grid: tuple[int, ...] | None, tokens: int = 1) -> Tensor:
        """The groups' results on a new first axis, restored as by `restore`: indices, or losses (pass no grid)."""
        return torch.stack(self.restore(parts, grid, tokens))

    def restore(self, parts: Sequence[Tensor], grid: tuple[int, ...] | None, tokens: int = 1) -> tuple[Tensor, ...]:
        """Each group's result with its axis `tokens`, which holds the N of a grid, as that grid.

        Indices (B, N, Q) have it at 1, codes (Q, B, N, d), which `forward` returns as a tuple of groups, at 2.
        """
        return tuple(part if grid is None else part.unflatten(tokens, grid) for part in parts)

    def dropout_seed(self, device: torch.device | str | None) -> Tensor | None:
        """One seed of quantizer dropout for all groups, so that they keep equally many stages; None if none drops."""
        first = self._stacks()[0]
        return first.dropout_seed(device) if self.training and first.quantize_dropout else None

    def _stacks(self) -> list[Any]:
        return list(self.rvqs)

    def _check_groups(self, indices: Tensor | Sequence[Tensor]) -> None:
        require(
            self,
            len(indices) == self.groups,
            f"indices has {len(indices)} groups on its first axis, expected {self.groups}",
        )
