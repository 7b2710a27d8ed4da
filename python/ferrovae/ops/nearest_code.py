"""`nearest_code`: the index of the nearest codebook row, exactly, without the N x K distance matrix.

H heads, N rows, K codes, D dimensions. Exact means: the index minimises the metric evaluated in float64 on the values
given (no fused multiply-add, d increasing), ties to the lowest index, on every backend.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ferrovae.ops import _checks, _rust, _triton
from ferrovae.ops._nearest_code_rounded import PRECISIONS, nearest_code_rounded
from ferrovae.ops._nearest_code_vmap import nearest_code_vmap
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops.nearest_code_distances import DTYPES, METRICS, nearest_code_distances

Metric = Literal["euclidean", "sqeuclidean", "cosine", "dot"]
Precision = Literal["exact", "tf32", "bf16"]
MOST_RESULTS = 32  # of topk


@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = ...,
    return_distances: Literal[False] = ...,
    topk: int | None = ...,
    precision: Precision = ...,
) -> Tensor: ...
@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = ...,
    return_distances: Literal[True],
    topk: int | None = ...,
    precision: Precision = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = ...,
    return_distances: bool,
    topk: int | None = ...,
    precision: Precision = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    return_distances: bool = False,
    topk: int | None = None,
    precision: Precision = "exact",
) -> Tensor | tuple[Tensor, Tensor]:
    """argmin over k of metric(x, codebook[k]): x [..., D], codebook [K, D] -> int64 [...].

    Args:
        x: [..., D] float32, float64, bfloat16 or float16, values taken as they are; with heads [H, ..., D].
        codebook: [K, D], or [H, K, D] for one codebook a head; any of these dtypes.
        metric: smaller is nearer. `"euclidean"` |x - e|, `"sqeuclidean"` |x - e|^2 (these two order codes alike, by
            the square), `"cosine"` 1 - x.e / (|x| |e|), 1 where either vector is zero (ordered by x.e / |e|),
            `"dot"` -x.e.
        return_distances: also return the winners' distances.
        topk: the k nearest codes, nearest first, on a new last axis [..., k]; 1 <= k <= min(K, 32).
        precision: `"exact"`, or a faster search meant for GPUs that can return another code than the nearest:
            `"tf32"`, `"bf16"` round x and e (taken from the codebook's mean, for the Euclidean metrics) to 11 or 8
            significant bits, and order codes by |e|^2/2 - x.e or -x.e of those in float32. A CPU gives the same, more
            slowly than exact. Distances are those of the codes returned, as precise as ever.

    Returns:
        indices int64 [...] ([H, ...] with heads); with `return_distances` the pair (indices, distances float32), the
        distances differentiable with respect to x and codebook, with gradient 0 where the distance is 0 or not finite.

    Ties go to the lowest index, also in the order of topk. A row with a NaN gets index 0 (0, 1, ... with topk) and
    distance NaN. A code whose metric is NaN (it holds a NaN, or an infinity meets a zero) is infinitely far.
    x with no rows gives an empty result. Beside its results a search takes O(N + K D) memory, never N x K. On a GPU,
    topk > 1 and float64 run chunk by chunk in plain torch.

    Raises:
        ValueError: shapes that do not match, no codes, D = 0, an unknown metric or precision, topk out of range, two
            devices.
        TypeError: a dtype that is not floating point.
    """
    _check(x, codebook, metric, topk, precision)
    if x.dtype == torch.float64 or codebook.dtype == torch.float64:
        x, codebook = x.double(), codebook.double()
    codes = codebook.float() if codebook.dtype != torch.float64 else codebook
    heads = codes.ndim == 3
    if not heads:
        codes = codes.unsqueeze(0)
    leading = x.shape[:-1]
    rows = x.reshape(codes.shape[0], -1, x.shape[-1])
    indices = _operation(rows.detach(), codes.detach(), metric, 1 if topk is None else topk, precision)
    shape = leading if topk is None else (*leading, topk)
    if not return_distances:
        return indices.reshape(shape)
    distances = nearest_code_distances(rows, codes, indices, metric)
    return indices.reshape(shape), distances.float().reshape(shape)


def _check(x: Tensor, codebook: Tensor, metric: str, topk: int | None, precision: str) -> None:
    _checks.floating("nearest_code", "x", x)
    _checks.floating("nearest_code", "codebook", codebook)
    _checks.choice("nearest_code", "metric", metric, METRICS)
    _checks.choice("nearest_code", "precision", precision, PRECISIONS)
    _checks.same_device("nearest_code", "codebook", codebook, "x", x)
    if codebook.ndim not in (2, 3):
        raise ValueError(f"nearest_code: codebook is {tuple(codebook.shape)}, expected (K, D), or (H, K, D) with heads")
    if x.ndim < codebook.ndim - 1 or x.shape[-1] == 0:
        leading = "..., D" if codebook.ndim == 2 else "H, ..., D"
        raise ValueError(f"nearest_code: x is {tuple(x.shape)}, expected ({leading}) with D >= 1")
    expected = "(K, " if codebook.ndim == 2 else f"({x.shape[0]}, K, "
    if codebook.shape[-1] != x.shape[-1] or (codebook.ndim == 3 and codebook.shape[0] != x.shape[0]):
        raise ValueError(
            f"nearest_code: codebook is {tuple(codebook.shape)}, expected {expected}{x.shape[-1]}) "
            f"to match x {tuple(x.shape)}"
        )
    if codebook.numel() == 0:
        raise ValueError(f"nearest_code: codebook is {tuple(codebook.shape)}, expected at least one code")
    if topk is not None and not 1 <= topk <= MOST_RESULTS:
        raise ValueError(f"nearest_code: topk is {topk}, expected 1 to {MOST_RESULTS}")
    if topk is not None and topk > codebook.shape[-2]:
        raise ValueError(f"nearest_code: topk is {topk}, expected 1 to K = {codebook.shape[-2]}")


def _reference(x: Tensor, codebook: Tensor, metric: str, topk: int, precision: str) -> Tensor:
    """The meaning: x [H, N, D], codebook [H, K, D] -> int64 [H, N, topk]; float64, in chunks of rows."""
    if precision != "exact":
        return nearest_code_rounded(x, codebook, metric, topk, precision)
    indices = torch.empty((*x.shape[:2], topk), dtype=torch.int64, device=x.device)
    chunk = max(1, 2**20 // codebook.shape[1])
    for head in range(x.shape[0]):
        codes = codebook[head].double()
        for start in range(0, x.shape[1], chunk):
            scores = _scores(x[head, start : start + chunk].double(), codes, metric).nan_to_num_(
                torch.inf, torch.inf, -torch.inf
            )
            if topk == 1:
                indices[head, start : start + chunk] = scores.argmin(1, keepdim=True)
            else:
                indices[head, start : start + chunk] = scores.sort(dim=1, stable=True).indices[:, :topk]
    return indices


def _scores(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """What orders the codes: x [n, D], codebook [K, D] float64 -> [n, K]; one dimension at a time, in order."""
    total = x.new_zeros(x.shape[0], codebook.shape[0])
    norms = x.new_zeros(codebook.shape[0])
    for d in range(x.shape[1]):
        if metric in ("euclidean", "sqeuclidean"):
            total += (x[:, d, None] - codebook[:, d]).square_()
        else:
            total -= x[:, d, None] * codebook[:, d]
            norms += codebook[:, d].square()
    if metric == "cosine":
        total /= torch.where(norms == 0, 1.0, norms.sqrt())
    return total


def _rust_kernel(x: Tensor, codebook: Tensor, metric: str, topk: int, precision: str) -> Tensor:
    if precision != "exact":
        return nearest_code_rounded(x, codebook, metric, topk, precision)
    x, codebook = x.contiguous(), codebook.contiguous()
    indices = torch.empty((*x.shape[:2], topk), dtype=torch.int64)
    dtype = str(x.dtype).removeprefix("torch.")
    sizes = (*x.shape[:2], *codebook.shape[1:], topk)
    spans = _rust.span(x), _rust.span(codebook)
    _rust.core.nearest_code(dtype, *spans, sizes, metric, _rust.span(indices), _rust.threads())
    return indices


def _triton_kernel(x: Tensor, codebook: Tensor, metric: str, topk: int, precision: str) -> Tensor:
    if topk > 1:
        return _reference(x, codebook, metric, topk, precision)
    kernels = _triton.kernels("nearest_code")
    return kernels.nearest_code(x.contiguous(), codebook.contiguous(), metric, precision, upcast=_triton.interpreted())


def _fake(x: Tensor, codebook: Tensor, metric: str, topk: int, precision: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], topk), dtype=torch.int64)


_operation = Operation(
    "nearest_code",
    "(Tensor x, Tensor codebook, str metric, int topk, str precision) -> Tensor",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust_kernel, DTYPES),
    triton=Kernel(_triton_kernel, DTYPES - {torch.float64}),
)
_operation.register_vmap(nearest_code_vmap(_operation.on))
