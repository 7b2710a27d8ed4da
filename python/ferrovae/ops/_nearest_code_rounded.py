"""The faster, named precisions of `nearest_code`: one product of rounded operands, nothing certified."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

PRECISIONS = ("exact", "tf32", "bf16")
_MATRIX = 2**22  # scores held at a time


def rounded(value: Tensor, precision: str) -> Tensor:
    """float32 with the significand of `precision`, to the nearest, ties to even."""
    if precision == "bf16":
        return value.bfloat16().float()
    bits = value.view(torch.int32)
    nearest = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(value.isfinite(), nearest.view(torch.float32), value)


def nearest_code_rounded(x: Tensor, codebook: Tensor, metric: str, topk: int, precision: str) -> Tensor:
    """x [H, N, D], codebook [H, K, D] -> int64 [H, N, topk], by |e|^2/2 - r(x).r(e) (Euclidean) or -r(x).r(e).

    r rounds to `precision`; everything else is float32. For the Euclidean metrics x and e are taken from the codebook's
    mean, for the cosine e is normalised first. Rows are taken in chunks of about 2^22 / K.
    """
    x, codes = x.float(), codebook.float()
    usable = codes.isfinite().all(-1)
    if metric == "cosine":
        codes = normalize(codes, dim=-1)
    codes = torch.where(usable.unsqueeze(-1), codes, 0.0)
    euclidean = metric in ("euclidean", "sqeuclidean")
    bias = torch.zeros_like(codes[..., 0])
    if euclidean:
        centre = codes.sum(1, keepdim=True) / usable.sum(1).clamp(min=1)[:, None, None]
        x, codes = x - centre, torch.where(usable.unsqueeze(-1), codes - centre, 0.0)
        bias = codes.square().sum(-1) / 2
    bias = torch.where(usable, bias, torch.inf)
    codes = rounded(codes, precision)
    indices = torch.empty((*x.shape[:2], topk), dtype=torch.int64, device=x.device)
    chunk = max(1, _MATRIX // codes.shape[1])
    for head in range(x.shape[0]):
        for start in range(0, x.shape[1], chunk):
            rows = rounded(x[head, start : start + chunk], precision)
            scores = (bias[head] - rows @ codes[head].T).nan_to_num_(torch.inf, torch.inf, -torch.inf)
            if topk == 1:
                indices[head, start : start + chunk] = scores.argmin(1, keepdim=True)
            else:
                indices[head, start : start + chunk] = scores.sort(dim=1, stable=True).indices[:, :topk]
    return indices
