"""The two entropies that train lookup-free codes, over the rows of every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferrovae.nn.quantizers.rank_sum import RankSum, rank_and_world_size
from ferrovae.ops import sign_code_entropy, sign_code_mean
from ferrovae.ops.sign_code_mean import MOST_BITS


def sign_entropies(
    x: Tensor, inv_temperature: float, scale: float, mask: Tensor | None, sum_over_ranks: RankSum
) -> tuple[Tensor, Tensor]:
    """Per-sample entropy and entropy of the mean distribution over codes {-s, s}^d, in nats, averaged over codebooks.

    A row's distribution is softmax_c 2 T <x, c>. The mean is over the rows of all ranks, each counted once. Its entropy
    is exact up to 18 bits; beyond, the bits are cut into ceil(d / 18) runs of nearly equal length and it is the sum of
    the runs' entropies, an upper bound that independent runs reach.

    x: (N, C, d); mask: (N,) bool, the rows that count, or None. Both are scalars, 0 where no row counts. The mean over
    ranks of the gradients of the second is its gradient over all rows: what DistributedDataParallel takes. RuntimeError
    from `sum_over_ranks` where the ranks do not act together, forward or backward.
    """
    bits = x.shape[-1]
    groups = -(-bits // MOST_BITS)
    pooled = rank_and_world_size()[1] > 1
    # Where the ranks pool their means, the batch entropy of this rank is of no interest: one bit a group costs nothing.
    pairs = [
        sign_code_entropy(book, inv_temperature, scale, bits if pooled else groups, mask=mask) for book in x.unbind(1)
    ]
    per_sample, batch = (torch.stack(entropies).mean() for entropies in zip(*pairs, strict=True))
    if pooled:
        batch = _pooled_entropy(x, inv_temperature, scale, mask, groups, sum_over_ranks)
    return per_sample, batch


def _pooled_entropy(
    x: Tensor, inv_temperature: float, scale: float, mask: Tensor | None, groups: int, sum_over_ranks: RankSum
) -> Tensor:
    """The same of the ranks' means weighted by their numbers of rows, by one all-reduce."""
    means = [
        sign_code_mean(part, inv_temperature, scale, mask=mask)
        for book in x.unbind(1)
        for part in book.tensor_split(groups, -1)
    ]
    rows = means[0].new_tensor(x.shape[0]) if mask is None else mask.sum().to(means[0].dtype)
    weighted = torch.cat([*(mean * rows for mean in means), rows[None]])
    *sums, total = _SumOverRanks.apply(weighted, sum_over_ranks).split([*(mean.numel() for mean in means), 1])
    return torch.stack([_entropy(part / total.clamp(min=1)) for part in sums]).sum() / x.shape[1]


def _entropy(distribution: Tensor) -> Tensor:
    """-sum m log m with 0 log 0 = 0 and a finite slope there."""
    tiny = torch.finfo(distribution.dtype).tiny
    return -(distribution * distribution.clamp(min=tiny).log()).sum()


class _SumOverRanks(torch.autograd.Function):
    """Each rank's loss depends on every rank's tensor, so that the gradients are summed over the ranks as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sum_over_ranks: RankSum) -> Tensor:
        ctx.sum_over_ranks = sum_over_ranks
        return sum_over_ranks([tensor])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.sum_over_ranks([grad])[0], None
