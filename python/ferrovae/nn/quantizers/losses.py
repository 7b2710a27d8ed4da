"""The terms of a vector quantizer's loss. H codebooks, N rows, K codes, D dimensions; all in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from ferrovae.nn.quantizers.rows import mean_square
from ferrovae.ops import code_cross_entropy, code_sums, mean_code_entropy
from ferrovae.ops.nearest_code import Metric


def commitment(x: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of (x - vectors)^2 over the visible elements; 0 where there are none.

    x, vectors: (..., D); mask: (...) bool or None.
    """
    if mask is None:
        return mse_loss(vectors, x) if x.numel() else (vectors - x).sum()
    return mean_square(vectors - x, mask)


def commitment_gradient(x: Tensor, codes: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of `commitment(x, codes[indices])` in the codes: 2 (n_k e_k - sum of the rows of k) / elements.

    x: (H, N, D) float32, of which rows that are not finite count nothing; codes: (H, K, D); indices: (H, N) int64;
    mask: (H, N) bool or None. Returns (H, K, D).
    """
    if mask is not None:
        indices = torch.where(mask, indices, -1)
    sums, counts = code_sums(x, indices, codes.shape[1], heads=True)
    rows = indices.numel() if mask is None else mask.sum().clamp(min=1)
    return (counts[..., None] * codes - sums) * 2 / (rows * x.shape[-1])


def commitment_by_row(x: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of (x - vectors)^2 over D for every row: (..., D) -> (...); 0 where masked."""
    squares = mse_loss(vectors, x, reduction="none").mean(dim=-1)
    return squares if mask is None else torch.where(mask, squares, 0.0)


def cross_entropy(x: Tensor, codes: Tensor, indices: Tensor, metric: Metric) -> Tensor:
    """The mean of -log softmax_k(-distance(x, e_k)) at the given codes, in nats; 0 where there are none.

    x: (H, N, D); codes: (H, K, D); indices: (H, N) int64, -1 is left out.
    """
    values = code_cross_entropy(x, codes, indices, metric=metric)
    return values.sum() / (indices >= 0).sum().clamp(min=1)


def by_position(x: Tensor, positions: int, shared: int) -> Tensor:
    """Rows (H, B P S, ...) of P positions, each with S heads that share a codebook, as (H, P, B S, ...)."""
    parts = x.reshape(x.shape[0], -1, positions, shared, *x.shape[2:])
    return parts.transpose(1, 2).flatten(2, 3)


def negative_diversity(x: Tensor, codes: Tensor, mask: Tensor | None, temperature: float, metric: Metric) -> Tensor:
    """Minus the entropy of the codes that a position attracts, in nats: the mean over positions and codebooks.

    A position's distribution is the mean over its M rows of softmax_k(-temperature distance(x, e_k)). Masked rows, and
    positions without others, are left out.

    x: (H, P, M, D); codes: (H, K, D); mask: (H, P, M) bool or None.
    """
    if x.numel() == 0:
        return x.sum()
    if mask is None:
        return -mean_code_entropy(x, codes, 1 / temperature, metric).mean()
    # The operation leaves rows that are not finite out of the mean.
    visible = torch.where(mask[..., None], x, torch.nan)
    seen = mask.any(dim=2)
    return -(mean_code_entropy(visible, codes, 1 / temperature, metric) * seen).sum() / seen.sum().clamp(min=1)


def orthogonality(codes: Tensor, active: Tensor | None = None) -> Tensor:
    """sum_ij cos(e_i, e_j)^2 / n^2 - 1 / n over the n codes, averaged over codebooks (Shin et al., arXiv:2112.00384).

    The sum is the squared Frobenius norm of E^T E as well as of E E^T: no K x K matrix.

    codes: (H, K, D); active: (H, K) bool: the codes that count, by default all.
    """
    unit = normalize(codes, dim=-1, eps=1e-6)
    if active is None:
        counts = torch.full((codes.shape[0],), codes.shape[1], dtype=unit.dtype, device=unit.device)
    else:
        unit = torch.where(active[..., None], unit, 0.0)
        counts = active.sum(dim=-1).clamp(min=1).to(unit.dtype)
    gram = unit.mT @ unit if codes.shape[2] <= codes.shape[1] else unit @ unit.mT
    return (gram.square().sum(dim=(1, 2)) / counts.square() - 1 / counts).mean()


def chosen_codes(active: Tensor, most: int) -> Tensor:
    """A random choice of at most `most` of the active codes, of each codebook: (H, K) bool -> (H, K) bool."""
    if most >= active.shape[-1]:
        return active
    order = torch.rand(active.shape, device=active.device).masked_fill(~active, 2.0)
    chosen = torch.zeros_like(active).scatter(-1, order.topk(most, largest=False).indices, True)
    return chosen & active
