"""Lloyd's k-means over the rows of every rank, from a keyed start."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ferrovae.nn.quantizers.code_statistics import all_reduce_packed, code_statistics, rank_and_world_size
from ferrovae.nn.quantizers.keyed_sampling import stratified_rows
from ferrovae.ops import nearest_code


def kmeans(
    x: Tensor, valid: Tensor, size: int, iterations: int, *, key: Tensor, cosine: bool
) -> tuple[Tensor, Tensor] | None:
    """Cluster the valid rows of all ranks together; every rank gets the same answer and must call.

    Args:
        x: (N, D) float32; valid: (N,) bool. A rank may hold none.
        size: K, the number of clusters; it may exceed the number of rows, whose means then start as duplicates.
        iterations: Lloyd steps, >= 1. A mean that attracts no row stays where it is.
        key: int64 []: fixes the rows the means start from.
        cosine: assign by the largest inner product and keep the means at length 1; x has length 1 then.

    Returns:
        means (K, D) and counts (K,), float32, the counts those of the last assignment; None if no rank holds a row.
    """
    rank, world_size = rank_and_world_size()
    rows_per_rank = torch.zeros(world_size, device=x.device)
    rows_per_rank[rank] = valid.sum()
    rows_per_rank = all_reduce_packed([rows_per_rank])[0].to(torch.int64)
    total = int(rows_per_rank.sum())
    if total == 0:
        return None
    if total < size:
        warnings.warn(f"k-means start: {total} vectors for a codebook of {size} codes", stacklevel=2)
    means = x.new_zeros(size, x.shape[1])
    if x.shape[0] > 0:
        rows, filled = stratified_rows(valid, size, key, offset=rows_per_rank[:rank].sum(), total=total, distinct=False)
        means = torch.where(filled[:, None], x[rows], 0.0)
    means = all_reduce_packed([means])[0]
    counts = means.new_zeros(size)
    for _ in range(iterations):
        indices = nearest_code(x, means, metric="dot" if cosine else "euclidean")
        counts, sums = all_reduce_packed(code_statistics(x, indices, valid, size))
        moved = sums / counts.clamp(min=1)[:, None]
        if cosine:
            moved = normalize(moved, dim=-1, eps=1e-6)
        means = torch.where(counts[:, None] > 0, moved, means)
    return means, counts
