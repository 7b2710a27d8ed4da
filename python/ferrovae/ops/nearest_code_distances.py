"""`nearest_code_distances`: from rows to the codes chosen for them; the differentiable half of `nearest_code`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _rust, _triton
from ferrovae.ops._nearest_code_vmap import nearest_code_vmap
from ferrovae.ops._registry import Kernel, Operation

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")


def nearest_code_distances(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> Tensor:
    """metric(x, codebook[indices]): x [H, N, D], codebook [H, K, D], indices int64 [H, N, k] -> [H, N, k].

    float32 (float64 for float64 x). The gradients gather the chosen codes: O(N k D) memory, never N x K; they are 0
    where the distance is 0 or not finite. A NaN that does not come from the row itself reads as infinitely far.
    """
    return _operation(x, codebook, indices, metric)


def _gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook [H, K, D], indices [H, N, k] -> [H, N, k, D]."""
    heads = torch.arange(codebook.shape[0], device=codebook.device).view(-1, 1, 1)
    return codebook[heads, indices]


def _reference(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> Tensor:
    rows = x.double().unsqueeze(2)
    codes = _gather(codebook, indices).double()
    if metric in ("euclidean", "sqeuclidean"):
        distances = (rows - codes).square_().sum(-1)
        if metric == "euclidean":
            distances = distances.sqrt()
    else:
        distances = -(rows * codes).sum(-1)
        if metric == "cosine":
            norms = rows.square().sum(-1).sqrt() * codes.square().sum(-1).sqrt()
            distances = 1 + torch.where(norms == 0, 0.0, distances / norms)
    distances = distances.masked_fill(distances.isnan() & ~rows.isnan().any(-1), torch.inf)
    return distances.to(_result_dtype(x))


def _rust_kernel(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> Tensor:
    x, codebook, indices = x.contiguous(), codebook.contiguous(), indices.contiguous()
    distances = torch.empty(indices.shape, dtype=_result_dtype(x))
    dtype = str(x.dtype).removeprefix("torch.")
    sizes = (*x.shape[:2], *codebook.shape[1:], indices.shape[2])
    spans = _rust.span(x), _rust.span(codebook), _rust.span(indices)
    _rust.core.nearest_code_distances(dtype, *spans, sizes, metric, _rust.span(distances), _rust.threads())
    return distances


def _triton_kernel(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> Tensor:
    kernels = _triton.kernels("nearest_code_distances")
    return kernels.nearest_code_distances(x.contiguous(), codebook.contiguous(), indices.contiguous(), metric)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> Tensor:
    return indices.new_empty(indices.shape, dtype=_result_dtype(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codebook, indices, metric, _ = inputs
    ctx.save_for_backward(x, codebook, indices, output)
    ctx.metric = metric


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codebook, indices, distances = ctx.saved_tensors
    need_x, need_codebook = ctx.needs_input_grad[:2]
    scale = torch.where(distances.detach().isfinite(), grad, 0.0).unsqueeze(-1)
    rows = x.to(grad.dtype).unsqueeze(2)
    codes = _gather(codebook, indices).to(grad.dtype)
    of_row, of_code = _slopes(rows, codes, ctx.metric)
    grad_x = (_finite(of_row) * scale).sum(2).to(x.dtype) if need_x else None
    grad_codebook = None
    if need_codebook:
        heads, size, dims = codebook.shape
        position = indices + size * torch.arange(heads, device=indices.device).view(-1, 1, 1)
        zeros = torch.zeros(heads * size, dims, dtype=grad.dtype, device=grad.device)
        total = zeros.index_add(0, position.reshape(-1), (_finite(of_code) * scale).reshape(-1, dims))
        grad_codebook = total.view(heads, size, dims).to(codebook.dtype)
    return grad_x, grad_codebook, None, None, None


def _finite(slope: Tensor) -> Tensor:
    return torch.where(slope.isfinite(), slope, 0.0)


def _slopes(rows: Tensor, codes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """d metric / d row and d metric / d code, both [H, N, k, D]; 0 at distance 0 and at zero vectors."""
    if metric == "dot":
        return -codes, (-rows).expand_as(codes)
    if metric == "cosine":
        row, row_length = _direction(rows)
        code, code_length = _direction(codes)
        cosine = (row * code).sum(-1, keepdim=True)
        defined = (row_length > 0) & (code_length > 0)
        of_row = torch.where(defined, (cosine * row - code) / row_length.where(defined, 1.0), 0.0)
        return of_row, torch.where(defined, (cosine * code - row) / code_length.where(defined, 1.0), 0.0)
    difference = rows - codes
    slope = 2 * difference if metric == "sqeuclidean" else _direction(difference)[0]
    return slope, -slope


def _direction(vector: Tensor) -> tuple[Tensor, Tensor]:
    """vector / |vector| (0 for a zero vector) and |vector|, without overflow, and differentiable everywhere."""
    largest = vector.detach().abs().amax(-1, keepdim=True)
    nonzero = largest > 0
    scaled = vector / torch.where(nonzero, largest, 1.0)
    length = scaled.square().sum(-1, keepdim=True).where(nonzero, 1.0).sqrt()
    return scaled / length, torch.where(nonzero, length * largest, 0.0)


_operation = Operation(
    "nearest_code_distances",
    "(Tensor x, Tensor codebook, Tensor indices, str metric) -> Tensor",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust_kernel, DTYPES),
    triton=Kernel(_triton_kernel, DTYPES),
)
_operation.register_autograd(_backward, _setup_context)
_operation.register_vmap(nearest_code_vmap(_operation.on))
