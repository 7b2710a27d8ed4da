"""Lloyd's k-means over the rows of every rank, from a keyed start."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ferrovae.nn.quantizers.keyed_sampling import head_keys, stratified_rows
from ferrovae.nn.quantizers.rank_sum import all_reduce_packed, rank_and_world_size
from ferrovae.ops import code_sums, nearest_code


def kmeans(
    x: Tensor, valid: Tensor, size: int, iterations: int, *, key: Tensor, cosine: bool, synchronized: bool = True
) -> tuple[Tensor, Tensor] | None:
    """Cluster the valid rows of all ranks together, each head by itself; every rank gets the same answer.

    Args:
        x: (H, N, D) float32; valid: (H, N) bool. A rank may hold none.
        size: K, the number of clusters; it may exceed the number of rows, whose means then start as duplicates.
        iterations: Lloyd steps, >= 1. A mean that attracts no row stays where it is.
        key: int64 []: fixes the rows the means start from.
        cosine: assign by the largest inner product and keep the means at length 1; x has length 1 then.
        synchronized: over all ranks, which must all call; otherwise over this one's rows.

    Returns:
        means (H, K, D) and counts (H, K), float32, the counts those of the last assignment; None if some head has no
        row on any rank.
    """
    rank, world_size = rank_and_world_size() if synchronized else (0, 1)

    def over_ranks(*tensors: Tensor) -> list[Tensor]:
        return all_reduce_packed(tensors) if synchronized else list(tensors)

    heads, _, dim = x.shape
    held = torch.zeros(world_size, heads, dtype=torch.float64, device=x.device)
    held[rank] = valid.sum(dim=1)
    held = over_ranks(held)[0].to(torch.int64)
    totals = held.sum(dim=0).tolist()
    if min(totals) == 0:
        return None
    if min(totals) < size:
        warnings.warn(f"k-means start: {min(totals)} vectors for a codebook of {size} codes", stacklevel=2)
    means = x.new_zeros(heads, size, dim)
    if x.shape[1] > 0:
        for head, head_key in enumerate(head_keys(key, heads)):
            rows, filled = stratified_rows(
                valid[head], size, head_key, offset=held[:rank, head].sum(), total=totals[head], distinct=False
            )
            means[head] = torch.where(filled[:, None], x[head][rows], 0.0)
    (means,) = over_ranks(means)
    counts = means.new_zeros(heads, size)
    for _ in range(iterations):
        indices = nearest_code(x, means, metric="dot" if cosine else "euclidean")
        sums, counts = code_sums(x, torch.where(valid, indices, -1), size, heads=True)
        sums, counts = over_ranks(sums, counts)
        moved = sums / counts.clamp(min=1)[..., None]
        if cosine:
            moved = normalize(moved, dim=-1, eps=1e-6)
        means = torch.where(counts[..., None] > 0, moved, means)
    return means, counts
