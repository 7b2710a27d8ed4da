"""What a codebook learns from a batch: how many rows each code attracted, their sum, and rows to replace dead codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CodeStatistics(NamedTuple):
    """One batch's statistics of a codebook, float32, additive over ranks; H codebooks, K codes, D dimensions.

    Sent as `RankSum(...)([*first.parts(), *second.parts()])` and put together again by `with_parts`.
    """

    counts: Tensor  # (H, K): rows by code
    sums: Tensor  # (H, K, D): and their sum
    rows: Tensor | None = None  # (H, K, D): a row of the batch for each code, should it be dead; 0 where none
    filled: Tensor | None = None  # (H, K): 1 where `rows` holds one

    def parts(self) -> list[Tensor]:
        """The tensors that are there."""
        return [tensor for tensor in self if tensor is not None]

    def with_parts(self, parts: list[Tensor]) -> CodeStatistics:
        """The same with other tensors, as `parts` lists them."""
        return CodeStatistics(*parts)


def finite_rows(x: Tensor) -> Tensor:
    """Which rows hold neither NaN nor infinity: (..., D) -> (...) bool. 0 x is 0 for finite x only."""
    return (x * 0).sum(dim=-1) == 0


def perplexity(indices: Tensor, size: int) -> Tensor:
    """exp of the entropy of the codes' frequencies: float32 [], from 1 (one code, or no indices) to K (all alike).

    indices: (N,) int64 in [0, K).
    """
    counts = torch.zeros(size, dtype=torch.int64, device=indices.device)
    counts.index_add_(0, indices, torch.ones_like(indices))
    frequencies = counts / counts.sum().clamp(min=1)
    return torch.special.entr(frequencies).sum().exp()
