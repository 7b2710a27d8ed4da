"""The gradient of `residual_nearest_code` in the codebooks, and the gradient of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _rust
from ferrovae.ops._registry import Kernel, Operation


def _reference(of_quantized: Tensor, of_codes: Tensor, indices: Tensor, codes: int) -> Tensor:
    """[G, N, D], [G, N, Q or 0, D], indices [G, N, Q] -> [G, Q, K, D]: each code the sum of its rows, in float64.

    `index_put_` of float64 adds in a fixed order, on a GPU too.
    """
    groups, _, depth = indices.shape
    dims = of_quantized.shape[-1]
    values = of_quantized.double().unsqueeze(2)
    if of_codes.shape[2]:
        values = values + of_codes.double()
    book = torch.arange(groups * depth, device=indices.device).view(groups, 1, depth)
    reached = (indices >= 0).unsqueeze(-1)
    values = torch.where(reached, values, 0.0).reshape(-1, dims)
    place = (book * codes + indices.clamp(min=0)).reshape(-1)
    total = values.new_zeros(groups * depth * codes, dims)
    return total.index_put_((place,), values, accumulate=True).view(groups, depth, codes, dims).to(of_quantized.dtype)


def _rust_kernel(of_quantized: Tensor, of_codes: Tensor, indices: Tensor, codes: int) -> Tensor:
    of_quantized, of_codes, indices = of_quantized.contiguous(), of_codes.contiguous(), indices.contiguous()
    out = _fake(of_quantized, of_codes, indices, codes)
    groups, depth, _, dims = out.shape
    _rust.core.residual_nearest_code_backward(
        str(of_quantized.dtype).removeprefix("torch."),
        _rust.span(of_quantized),
        _rust.span(of_codes),
        _rust.span(indices),
        (groups, indices.shape[1], depth, depth, codes, dims),
        _rust.span(out),
        _rust.threads(),
    )
    return out


def _fake(of_quantized: Tensor, of_codes: Tensor, indices: Tensor, codes: int) -> Tensor:
    shape = (indices.shape[0], indices.shape[2], codes, of_quantized.shape[-1])
    return torch.empty(shape, dtype=of_quantized.dtype, device=indices.device)


_DTYPES = frozenset({torch.float32, torch.float64})
_gradients = Operation(
    "residual_nearest_code_backward",
    "(Tensor of_quantized, Tensor of_codes, Tensor indices, SymInt codes) -> Tensor",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust_kernel, _DTYPES),
    triton=Kernel(_reference, _DTYPES),
)


def _save_indices(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    indices = output[2]
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(indices)
    ctx.codes, ctx.backend = inputs[1].shape[2], inputs[-1]


def _backward(ctx: Any, of_quantized: Tensor, of_codes: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    of_codebooks = None
    if ctx.needs_input_grad[1]:
        of_codebooks = _gradients(of_quantized, of_codes, indices, ctx.codes, backend=ctx.backend)
    return None, of_codebooks, None, None, None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.depth = inputs[1].shape[2]


def _backward_twice(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of a sum over rows: every row takes what its codes got."""
    (indices,) = ctx.saved_tensors
    groups, _, depth = indices.shape
    book = torch.arange(groups * depth, device=indices.device).view(groups, 1, depth)
    place = book * grad.shape[2] + indices.clamp(min=0)
    taken = torch.where((indices >= 0).unsqueeze(-1), grad.flatten(0, 2)[place], 0.0)
    return taken.sum(2), taken[:, :, : ctx.depth], None, None, None


def register_gradients(forward: Operation) -> None:
    """Give `forward` its gradient."""
    forward.register_autograd(_backward, _save_indices)
    _gradients.register_autograd(_backward_twice, _save)
