"""Grouped residual vector quantization: a residual stack for each group of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ferrovae.nn.quantizers.checks import require
from ferrovae.nn.quantizers.grouped import GroupedResidual
from ferrovae.nn.quantizers.layout import visible_tokens
from ferrovae.nn.quantizers.rank_sum import RankSum
from ferrovae.nn.quantizers.residual_vq import ResidualVQ
from ferrovae.nn.quantizers.stack_update import apply_updates
from ferrovae.nn.quantizers.usage import CodebookUsage


class GroupedResidualVQ(GroupedResidual):
    """G `ResidualVQ` side by side, each over D / G of the channels (HiFi-Codec, Yang et al., 2023, arXiv:2305.02765).

    Under `torch.distributed` the statistics of all groups and stages are summed over the ranks in one all-reduce.

    Args:
        dim: D, the channels of x.
        groups: G.
        accept_image_fmap: x is (B, D, H, W).
        kwargs: options of each `ResidualVQ`.

    Raises:
        ValueError: G does not divide D.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, groups, accept_image_fmap, lambda channels: ResidualVQ(dim=channels, **kwargs))
        self._sum_over_ranks = RankSum(
            f"{type(self).__name__}(dim={dim}, groups={groups})", kwargs.get("sync_timeout", 60.0)
        )

    def usage(
        self, indices: Tensor | None = None, threshold: float | None = None
    ) -> tuple[tuple[CodebookUsage, ...], ...]:
        """`ResidualVQ.usage` of each group; indices: (G, B, ..., Q)."""
        parts = [None] * self.groups if indices is None else indices
        return tuple(rvq.usage(part, threshold) for rvq, part in zip(self._stacks(), parts, strict=True))

    def forward(
        self,
        x: Tensor,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | Tensor | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Quantize each group by its own stack; all keep equally many stages.

        Args:
            x: (B, N, D), or (B, D, H, W) with `accept_image_fmap`; floating point.
            indices: int64 (G, B, ..., Q): return the sum of the groups' cross-entropies at these codes.
            return_all_codes, sample_codebook_temp, freeze_codebook, mask: as `ResidualVQ` has them.

        Returns:
            quantized: shape and dtype of x.
            indices: (G, B, ..., Q) int64.
            losses: (G, Q).
            codes: only if asked for, one (Q, B, ..., D / G) for each group.

            With `indices` only quantized and the sum of all cross-entropies.
        """
        parts, grid = self.split(x)
        tokens = x.movedim(self.split_dim, -1)
        visible = visible_tokens(type(self).__name__, tokens, mask, None)
        if visible is not None and grid is not None:
            visible = visible.flatten(1)
        targets: list[Tensor] | list[None] = [None] * self.groups
        if indices is not None and len(indices):
            require(self, len(indices) == self.groups, f"indices has {len(indices)} groups, expected {self.groups}")
            targets = [part if grid is None else part.flatten(1, -2) for part in indices]
        seed = self.dropout_seed(x.device)
        results, updates = [], []
        for rvq, part, target in zip(self._stacks(), parts, targets, strict=True):
            outputs, learnt = rvq.quantize(
                part, visible, target, return_all_codes, sample_codebook_temp, freeze_codebook, None, seed
            )
            results.append(outputs)
            updates += learnt
        apply_updates(updates, self._sum_over_ranks)
        for rvq in self._stacks():
            rvq.step_in_place(freeze_codebook)
        quantized, *rest = zip(*results, strict=True)
        joined = self.join(quantized, grid)
        if targets[0] is not None:
            return joined, torch.stack(rest[0]).sum()
        out = joined, self.stack(rest[0], grid), torch.stack(rest[1])
        if not return_all_codes:
            return out
        return (*out, tuple(codes if grid is None else codes.unflatten(2, grid) for codes in rest[2]))
