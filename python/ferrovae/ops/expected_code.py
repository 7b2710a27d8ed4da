"""`expected_code`: the mean of the codes under softmax(-distance / temperature), without the N x K matrix.

Attention with the codebook as keys and values: soft assignment.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _code_softmax, _codes
from ferrovae.ops._code_softmax import Gradients, Head
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops.nearest_code import Metric

_NAME = "expected_code"


def expected_code(
    x: Tensor, codebook: Tensor, temperature: float | Tensor = 1.0, metric: Metric = "euclidean"
) -> Tensor:
    """sum_k p_k e_k with p = softmax_k(-distance(x, e_k) / temperature): x [..., D], codebook [K, D] -> [..., D].

    Args:
        x: [..., D] float32, float64, bfloat16 or float16; with heads [H, ..., D].
        codebook: [K, D], or [H, K, D] for one codebook a head; any of these dtypes.
        temperature: positive; a number, or a tensor of one element, which then gets a gradient.
        metric: `"euclidean"`, `"sqeuclidean"`, `"cosine"` or `"dot"`, as for `code_logsumexp`. With `"cosine"` the
            directions are compared, and the codes themselves averaged.

    Returns:
        x's shape, float32; float64 where x or the codebook is. Differentiable once, in x, codebook and temperature. A
        row that is not finite gives NaN and no gradient; so does every row if no code is finite. No rows give an empty
        result. Memory beyond inputs and results: O(N + K D), and at most 64 MiB.

    Raises:
        ValueError, TypeError: as `code_logsumexp`.
    """
    rows, codes, scale, kernel_metric = _codes.prepared(_NAME, x, codebook, temperature, metric)
    values = codebook.to(codes.dtype).reshape(codes.shape) if metric == "cosine" else codes
    return _operation(rows, codes, values, scale, kernel_metric)[0].reshape(x.shape)


def _forward(
    x: Tensor, codebook: Tensor, values: Tensor, temperature: Tensor, metric: str, backend: str
) -> tuple[Tensor, Tensor]:
    """The expected values [H, N, D] and the lse [H, N] of keys `codebook` and `values`."""
    _codes.positive(_NAME, temperature)
    x, codes, rows, bias = _codes.usable(x, codebook)
    values = torch.where(bias.isinf().unsqueeze(-1), 0.0, values)
    lse = _code_softmax.logsumexp(x, codes, bias, temperature, metric, backend)
    lse.masked_fill_(~rows, torch.nan)
    out = torch.zeros_like(x)
    for number in range(x.shape[0]):
        head = Head(x[number], codes[number], bias[number], lse[number], temperature, metric)
        for block in _code_softmax.each_block(head, 0, x.shape[1], backend)():
            out[number, block.rows].addmm_(block.probabilities, values[number, block.codes])
    return out.masked_fill_(~lse.isfinite().unsqueeze(-1), torch.nan), lse


def _backward(
    x: Tensor,
    codebook: Tensor,
    values: Tensor,
    temperature: Tensor,
    lse: Tensor,
    expected: Tensor,
    grad: Tensor,
    grad_lse: Tensor,
    metric: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A score's gradient is p (grad . value - grad . expected + grad_lse)."""
    x, codes, _, bias = _codes.usable(x, codebook)
    values = torch.where(bias.isinf().unsqueeze(-1), 0.0, values)
    known = lse.isfinite()
    grad = torch.where(known.unsqueeze(-1), grad, 0.0)
    shift = torch.where(known, grad_lse - (grad * expected).sum(-1), 0.0)
    of_x, of_codes, of_values = torch.empty_like(x), torch.empty_like(codes), torch.zeros_like(codes)
    of_temperature = torch.zeros_like(temperature)
    for number in range(x.shape[0]):
        head = Head(x[number], codes[number], bias[number], lse[number], temperature, metric)
        gradients = Gradients(head)
        for block in _code_softmax.each_block(head, 0, x.shape[1], backend)():
            along = grad[number, block.rows]
            of_values[number, block.codes].addmm_(block.probabilities.mT, along)
            weights = torch.addmm(shift[number, block.rows, None], along, values[number, block.codes].mT)
            gradients.add(block.rows, block.codes, weights.mul_(block.slopes))
        of_x[number], of_codes[number], of_this = gradients.finish()
        of_temperature += of_this
    return of_x, of_codes, of_values, of_temperature


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2])


def _fake_backward(
    x: Tensor, codebook: Tensor, values: Tensor, temperature: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, codebook, values, temperature))  # type: ignore[return-value]


_operation = Operation(
    _NAME,
    "(Tensor x, Tensor codebook, Tensor values, Tensor temperature, str metric) -> (Tensor, Tensor)",
    reference=partial(_forward, backend="reference"),
    fake=_fake,
    rust=Kernel(partial(_forward, backend="rust"), _codes.KERNEL_DTYPES),
    triton=Kernel(partial(_forward, backend="triton"), _codes.KERNEL_DTYPES),
)
_gradient = Operation(
    f"{_NAME}_backward",
    "(Tensor x, Tensor codebook, Tensor values, Tensor temperature, Tensor lse, Tensor expected, Tensor grad, "
    "Tensor grad_lse, str metric) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=partial(_backward, backend="reference"),
    fake=_fake_backward,
    rust=Kernel(partial(_backward, backend="rust"), _codes.KERNEL_DTYPES),
    triton=Kernel(partial(_backward, backend="triton"), _codes.KERNEL_DTYPES),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.metric, ctx.backend = inputs
    expected, lse = output
    ctx.save_for_backward(*tensors, lse, expected)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, lse, expected = ctx.saved_tensors
    grad = torch.zeros_like(expected) if grad is None else grad
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    return *_gradient(*tensors, lse, expected, grad, grad_lse, ctx.metric, backend=ctx.backend), None, None


_operation.register_autograd(_differentiate, _save)
_codes.differentiable_once(_gradient)
