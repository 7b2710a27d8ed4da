"""`mean_code_entropy`: the entropy of the mean code distribution, a measure of diversity, without the N x K matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _code_softmax, _codes
from ferrovae.ops._code_softmax import Gradients, Head
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops.nearest_code import Metric

_NAME = "mean_code_entropy"


def mean_code_entropy(
    x: Tensor, codebook: Tensor, temperature: float | Tensor = 1.0, metric: Metric = "euclidean"
) -> Tensor:
    """-sum_k m_k log m_k with m = mean over the M rows of softmax_k(-distance / temperature): x [..., M, D] -> [...].

    Each leading position is a group of M rows with an entropy of its own, between 0 and log K nats. To have one of all
    rows, flatten x to [N, D].

    Args:
        x: [..., M, D] float32, float64, bfloat16 or float16; with heads [H, ..., M, D].
        codebook: [K, D], or [H, K, D] for one codebook a head; any of these dtypes.
        temperature: positive; a number, or a tensor of one element, which then gets a gradient.
        metric: `"euclidean"`, `"sqeuclidean"`, `"cosine"` or `"dot"`, as for `code_logsumexp`.

    Returns:
        [...] ([H, ...] with heads), float32; float64 where x or the codebook is. Differentiable once, in x, codebook
        and temperature. Rows that are not finite are left out of the mean and get no gradient; a group of no rows
        gives 0. Memory beyond inputs and results: O(N + K D), and at most 64 MiB.

    Raises:
        ValueError, TypeError: as `code_logsumexp`; x without a dimension of rows.
    """
    rows, codes, scale, kernel_metric = _codes.prepared(_NAME, x, codebook, temperature, metric)
    if x.ndim < codebook.ndim:
        expected = "(..., M, D)" if codebook.ndim == 2 else "(H, ..., M, D)"
        raise ValueError(f"{_NAME}: x is {tuple(x.shape)}, expected {expected}")
    groups = x.shape[codebook.ndim - 2 : -2]
    grouped = rows.reshape(codes.shape[0], math.prod(groups), *x.shape[-2:])
    return _operation(grouped, codes, scale, kernel_metric)[0].reshape(x.shape[:-2])


def _batches(groups: int, rows: int, codes: int, size: int) -> Iterator[tuple[int, int]]:
    """First and last group of what is worked on together: groups whose rows fill a block of `size`, or one."""
    widest = next(_code_softmax.row_slices(0, size, codes, size)).stop
    step = max(1, min(widest // rows, size // codes))
    for first in range(0, groups, step):
        yield first, min(groups, first + step)


def _group_sums(values: Tensor, groups: int) -> Tensor:
    """[n, k] of whole groups, or of a part of one -> sums over the rows [groups, k] in float64."""
    return values.view(groups, -1, values.shape[1]).sum(1).double()


def _forward(x: Tensor, codebook: Tensor, temperature: Tensor, metric: str, backend: str) -> tuple[Tensor, Tensor]:
    """The entropy [H, G] and the lse [H, G, M]."""
    _codes.positive(_NAME, temperature)
    heads, groups, rows, dims = x.shape
    x, codes, finite, bias = _codes.usable(x.reshape(heads, groups * rows, dims), codebook)
    lse = _code_softmax.logsumexp(x, codes, bias, temperature, metric, backend)
    lse.masked_fill_(~finite, torch.nan)
    lse = lse.view(heads, groups, rows)
    entropy = torch.zeros(heads, groups, dtype=x.dtype, device=x.device)
    count = lse.isfinite().sum(2).clamp(min=1)
    for number in range(heads if rows else 0):
        head = Head(x[number], codes[number], bias[number], lse[number].reshape(-1), temperature, metric)
        for first, last in _batches(groups, rows, codes.shape[1], _code_softmax.limit(x.dtype, backend)):
            blocks = _code_softmax.each_block(head, first * rows, last * rows, backend)
            mean = _mean(blocks(), last - first, codes.shape[1], count[number, first:last])
            entropy[number, first:last] = -torch.xlogy(mean, mean).sum(1)
    return entropy, lse


def _mean(blocks: Any, groups: int, codes: int, count: Tensor) -> Tensor:
    """The mean distributions [groups, K], float64."""
    mean = torch.zeros(groups, codes, dtype=torch.float64, device=count.device)
    for block in blocks:
        mean[:, block.codes] += _group_sums(block.probabilities, groups)
    return mean / count.unsqueeze(1)


def _backward(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor,
    metric: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A score's gradient is p (u_k - sum_j p_j u_j) grad / count + p grad_lse, with u = -log m."""
    heads, groups, rows, dims = x.shape
    shape = x.shape
    x, codes, _, bias = _codes.usable(x.reshape(heads, groups * rows, dims), codebook)
    known = lse.isfinite()
    per_row = torch.where(known, (grad / known.sum(2).clamp(min=1)).unsqueeze(2), 0.0).view(heads, -1, 1)
    of_lse = torch.where(known, grad_lse, 0.0).view(heads, -1, 1)
    of_x, of_codes, of_temperature = torch.zeros_like(x), torch.zeros_like(codes), torch.zeros_like(temperature)
    for number in range(heads if rows else 0):
        head = Head(x[number], codes[number], bias[number], lse[number].reshape(-1), temperature, metric)
        gradients = Gradients(head)
        for first, last in _batches(groups, rows, codes.shape[1], _code_softmax.limit(x.dtype, backend)):
            blocks = _code_softmax.each_block(head, first * rows, last * rows, backend)
            mean = _mean(blocks(), last - first, codes.shape[1], known[number, first:last].sum(1).clamp(min=1))
            surprise = -torch.where(mean > 0, mean, 1.0).log().to(x.dtype)
            centre = _expectation(blocks(), surprise, first * rows, last * rows)
            for block in blocks():
                weights = (
                    _spread(surprise[:, block.codes], block.probabilities) - centre[_shifted(block.rows, first * rows)]
                )
                weights = weights * per_row[number, block.rows] + of_lse[number, block.rows]
                gradients.add(block.rows, block.codes, weights.mul_(block.slopes))
        of_x[number], of_codes[number], of_this = gradients.finish()
        of_temperature += of_this
    return of_x.view(shape), of_codes, of_temperature


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start - by, rows.stop - by)


def _spread(of_groups: Tensor, like: Tensor) -> Tensor:
    """[groups, k] for each of their rows, [n, k] like `like`."""
    groups = of_groups.shape[0]
    return of_groups.unsqueeze(1).expand(groups, like.shape[0] // groups, -1).reshape(like.shape)


def _expectation(blocks: Any, surprise: Tensor, start: int, end: int) -> Tensor:
    """sum_k p_k u_k of rows start..end: [n, 1]."""
    total = surprise.new_zeros(end - start, 1)
    for block in blocks:
        part = _spread(surprise[:, block.codes], block.probabilities).mul(block.probabilities)
        total[_shifted(block.rows, start)] += part.sum(1, keepdim=True)
    return total


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape[:3])


def _fake_backward(x: Tensor, codebook: Tensor, temperature: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape), temperature.new_empty(())


_operation = Operation(
    _NAME,
    "(Tensor x, Tensor codebook, Tensor temperature, str metric) -> (Tensor, Tensor)",
    reference=partial(_forward, backend="reference"),
    fake=_fake,
    rust=Kernel(partial(_forward, backend="rust"), _codes.KERNEL_DTYPES),
    triton=Kernel(partial(_forward, backend="triton"), _codes.KERNEL_DTYPES),
)
_gradient = Operation(
    f"{_NAME}_backward",
    "(Tensor x, Tensor codebook, Tensor temperature, Tensor lse, Tensor grad, Tensor grad_lse, str metric) "
    "-> (Tensor, Tensor, Tensor)",
    reference=partial(_backward, backend="reference"),
    fake=_fake_backward,
    rust=Kernel(partial(_backward, backend="rust"), _codes.KERNEL_DTYPES),
    triton=Kernel(partial(_backward, backend="triton"), _codes.KERNEL_DTYPES),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.metric, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    x, codebook, temperature, lse = ctx.saved_tensors
    grad = lse.new_zeros(lse.shape[:2]) if grad is None else grad
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    return *_gradient(x, codebook, temperature, lse, grad, grad_lse, ctx.metric, backend=ctx.backend), None, None


_operation.register_autograd(_differentiate, _save)
_codes.differentiable_once(_gradient)
