"""Which codes a row is replaced by: the nearest, the k nearest, or a draw by distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ferrovae.ops import nearest_code, sample_code
from ferrovae.ops.nearest_code import MOST_RESULTS, Metric


def metric_of(cosine: bool) -> Metric:
    """Vectors of length 1 are compared by inner products."""
    return "dot" if cosine else "euclidean"


@torch.no_grad()
def look_up(
    x: Tensor, codes: Tensor, *, cosine: bool, topk: int | None = None, temperature: float | Tensor | None = None
) -> Tensor:
    """The nearest code of every row, exactly; no N x K matrix.

    Args:
        x: (H, N, D) float32. codes: (H, K, D) float32.
        topk: the k nearest, nearest first.
        temperature: draw from softmax(-distance / temperature) instead; with `topk`, k different codes one after the
            other.

    Returns:
        (H, N) int64, (H, N, k) with `topk`; 0 for a row that is not finite.
    """
    metric = metric_of(cosine)
    if topk is None:
        if temperature is None:
            return nearest_code(x, codes, metric=metric)
        return sample_code(x, codes, temperature, metric=metric)
    if temperature is None and topk <= MOST_RESULTS:
        return nearest_code(x, codes, metric=metric, topk=topk)
    return _best(x, codes, topk, temperature, cosine)


def _best(x: Tensor, codes: Tensor, topk: int, temperature: float | Tensor | None, cosine: bool) -> Tensor:
    """In chunks of rows; the k largest of scores with Gumbel noise are k draws without replacement."""
    step = max(1, 2**20 // codes.shape[1])
    heads = []
    for rows, book in zip(x, codes, strict=True):
        parts = [torch.empty(0, topk, dtype=torch.int64, device=x.device)]
        exact = book.double()
        for chunk in rows.double().split(step):
            scores = chunk @ exact.mT if cosine else -torch.cdist(chunk, exact, compute_mode=_DIFFERENCES)
            if temperature is not None:
                scores = scores / temperature - torch.empty_like(scores).exponential_().log()
            order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(dim=-1, descending=True, stable=True)
            parts.append(order.indices[:, :topk])
        heads.append(torch.cat(parts))
    return torch.stack(heads)


_DIFFERENCES = "donot_use_mm_for_euclid_dist"
