"""`sign_code_mean`: the mean distribution of N rows over the 2^d sign codes, each bit random by itself.

N rows, d bits. The product over d bits splits into a table over the first floor(d / 2) bits and one over the others, so
that the mean is a matrix product of tables [N, 2^(d/2)]: O(N 2^d) additions but never N 2^d numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks, _rust, _triton
from ferrovae.ops._registry import Kernel, Operation

MOST_BITS = 18
DTYPES = frozenset(_checks.FLOATS)


def sign_code_mean(
    x: Tensor, inv_temperature: float = 100.0, codebook_scale: float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    """m[c] = mean over rows of prod_i sigmoid(+-4 T s x_i), + where bit i of c is 1: the softmax over all sign codes.

    Lookup-free quantization takes the softmax of 2 T <x, c> over the codes c in {-s, s}^d; that is this product.

    Args:
        x: [..., d] float32, float64, bfloat16 or float16, 1 <= d <= 18.
        inv_temperature: T, positive.
        codebook_scale: s, positive.
        mask: bool [...], the rows to take (default: all).

    Returns:
        [2^d] float32 (float64 for float64 x), the first bit most significant; it sums to 1, or is 0 where there are no
        rows. NaN when a row taken holds a NaN; an infinite x is a certain bit. Differentiable, also twice, in x.
        Averaged over ranks by their numbers of rows, it is the distribution of all their rows.

    Raises:
        ValueError: shapes that do not match, d outside 1 to 18, T or s not positive and finite, devices that differ.
        TypeError: x is not floating point, the mask is not bool.
    """
    rows, chosen, slope = check("sign_code_mean", x, inv_temperature, codebook_scale, mask)
    if not 1 <= rows.shape[1] <= MOST_BITS:
        raise ValueError(f"sign_code_mean: x is {_checks.shape(x)}, expected (..., d) with 1 <= d <= {MOST_BITS}")
    return mean(rows, chosen, slope)


def check(
    name: str, x: Tensor, inv_temperature: float, codebook_scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, float]:
    """x as [N, d], the mask as [N], and 4 T s."""
    if _checks.floating(name, "x", x).ndim == 0:
        raise ValueError(f"{name}: x is (), expected (..., d)")
    for label, value in (("inv_temperature", inv_temperature), ("codebook_scale", codebook_scale)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: {label} is a {type(value).__name__}, expected a number")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: {label} is {value}, expected a positive, finite number")
    if mask is not None:
        if _checks.tensor(name, "mask", mask).dtype != torch.bool:
            raise TypeError(f"{name}: mask is {mask.dtype}, expected bool")
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{name}: mask is {_checks.shape(mask)}, expected {tuple(x.shape[:-1])} to match x {_checks.shape(x)}"
            )
        _checks.same_device(name, "mask", mask, "x", x)
    rows = math.prod(x.shape[:-1])
    return (
        x.reshape(rows, x.shape[-1]),
        None if mask is None else mask.reshape(rows),
        4.0 * inv_temperature * codebook_scale,
    )


def mean(x: Tensor, mask: Tensor | None, slope: float) -> Tensor:
    """The same of checked x [N, d], mask [N] and slope 4 T s."""
    return _forward(x, mask, slope)


def result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def count(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """How many rows are taken, at least 1, without waiting for the device."""
    return max(x.shape[0], 1) if mask is None else mask.sum().clamp(min=1)


def taken(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with 0 in the rows that are not taken."""
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)


def _table(probabilities: Tensor) -> Tensor:
    """probabilities [n, bits, 2] of 0 and 1 -> [n, 2^bits], the first bit most significant."""
    table = probabilities.new_ones(len(probabilities), 1)
    for bit in probabilities.unbind(1):
        table = (table.unsqueeze(-1) * bit.unsqueeze(1)).flatten(1)
    return table


def _probabilities(x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """x [n, d] -> [n, bits, 2], of 0 and 1, of its first and its last bits."""
    slopes = slope * x
    probabilities = torch.stack((torch.sigmoid(-slopes), torch.sigmoid(slopes)), -1)
    return probabilities[:, : x.shape[1] // 2], probabilities[:, x.shape[1] // 2 :]


def _chunks(x: Tensor, numbers: int = 2**20) -> Iterator[slice]:
    """Rows whose tables have about so many numbers."""
    size = max(1, numbers >> (x.shape[1] + 1) // 2)
    return (slice(start, start + size) for start in range(0, x.shape[0], size))


def _reference(x: Tensor, mask: Tensor | None, slope: float) -> Tensor:
    """The meaning, in float64, in chunks of rows."""
    values = taken(x, mask).double()
    total = values.new_zeros(2 ** x.shape[1])
    for rows in _chunks(x):
        left, right = (_table(bits) for bits in _probabilities(values[rows], slope))
        total += ((left if mask is None else left * mask[rows].unsqueeze(-1)).T @ right).flatten()
    return (total / count(x, mask)).to(result_dtype(x))


def _slopes(x: Tensor, weights: Tensor, slope: float) -> Tensor:
    """The gradient in x [n, d] of the sum over rows of weights [2^d] times their distributions; differentiable.

    With Q the products of a table and its gradient, and S0, S1 the sums of Q over the codes in which a bit is 0, 1, the
    derivative in a = slope x of that bit is p0 S1 - p1 S0.
    """
    bits = _probabilities(x, slope)
    left, right = _table(bits[0]), _table(bits[1])
    weights = weights.view(left.shape[1], right.shape[1])
    slopes = []
    for probabilities, products in zip(bits, (left * (right @ weights.T), right * (left @ weights)), strict=True):
        for i, bit in enumerate(probabilities.unbind(1)):
            sums = products.unflatten(1, (2**i, 2, -1)).sum((1, 3))
            slopes.append(bit[:, 0] * sums[:, 1] - bit[:, 1] * sums[:, 0])
    return slope * torch.stack(slopes, 1)


def _reference_backward(x: Tensor, mask: Tensor | None, weights: Tensor, slope: float) -> Tensor:
    values, weights = taken(x, mask).double(), weights.double()
    out = torch.empty_like(values)
    for rows in _chunks(x):
        out[rows] = _slopes(values[rows], weights, slope)
    return (taken(out, mask) / count(x, mask)).to(x.dtype).contiguous()


def _compact(x: Tensor, mask: Tensor | None) -> Tensor:
    """What Rust reads: the rows that are taken, in the type that is computed in."""
    return (x if mask is None else x[mask]).to(result_dtype(x)).contiguous()


def _dtype(x: Tensor) -> str:
    return str(result_dtype(x)).removeprefix("torch.")


def _rust_forward(x: Tensor, mask: Tensor | None, slope: float) -> Tensor:
    rows = _compact(x, mask)
    out = torch.empty(2 ** x.shape[1], dtype=rows.dtype)
    _rust.core.sign_code_mean(_dtype(x), _rust.span(rows), x.shape[1], slope, _rust.span(out), _rust.threads())
    return out


def _centred(weights: Tensor) -> Tensor:
    """Probabilities sum to 1, so a constant has no gradient: without it, sums in float32 cancel less."""
    return weights.contiguous() - weights.mean()


def _rust_backward(x: Tensor, mask: Tensor | None, weights: Tensor, slope: float) -> Tensor:
    rows, weights = _compact(x, mask), _centred(weights)
    out = torch.empty_like(rows)
    spans = _rust.span(rows), _rust.span(weights)
    _rust.core.sign_code_mean_backward(_dtype(x), *spans, x.shape[1], slope, _rust.span(out), _rust.threads())
    return spread(out, x, mask)


def spread(out: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Gradients of the rows that are taken, in their places, and 0 elsewhere."""
    if mask is None:
        return out.to(x.dtype)
    return torch.zeros(x.shape, dtype=x.dtype).masked_scatter_(mask.unsqueeze(-1), out.to(x.dtype))


def _triton_forward(x: Tensor, mask: Tensor | None, slope: float) -> Tensor:
    kernels = _triton.kernels("sign_code_mean")
    total = kernels.forward(x.contiguous(), mask, slope, result_dtype(x))
    return total / count(x, mask)


def _triton_backward(x: Tensor, mask: Tensor | None, weights: Tensor, slope: float) -> Tensor:
    kernels = _triton.kernels("sign_code_mean")
    return kernels.backward(x.contiguous(), mask, _centred(weights) / count(x, mask), slope)


def _fake(x: Tensor, mask: Tensor | None, slope: float) -> Tensor:
    return x.new_empty(2 ** int(x.shape[1]), dtype=result_dtype(x))


def _fake_backward(x: Tensor, mask: Tensor | None, weights: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward = Operation(
    "sign_code_mean",
    "(Tensor x, Tensor? mask, float slope) -> Tensor",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust_forward, DTYPES),
    triton=Kernel(_triton_forward, DTYPES),
)
_backward = Operation(
    "sign_code_mean_backward",
    "(Tensor x, Tensor? mask, Tensor weights, float slope) -> Tensor",
    reference=_reference_backward,
    fake=_fake_backward,
    rust=Kernel(_rust_backward, DTYPES),
    triton=Kernel(_triton_backward, DTYPES),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.slope, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mask = ctx.saved_tensors
    return _backward(x, mask, grad, ctx.slope, backend=ctx.backend), None, None, None


def _differentiate_twice(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The derivatives of grad . dx, in plain torch, by way of torch's own."""
    x, mask, weights = ctx.saved_tensors
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        values, factors = _leaf(taken(x, mask).double()), _leaf(weights.double())
        scale = taken(grad, mask).double() / count(x, mask)
        inner = (_slopes(values, factors, ctx.slope) * scale).sum()
        d_x, d_weights = torch.autograd.grad(inner, (values, factors), create_graph=again)
    return taken(d_x, mask).to(x.dtype), None, d_weights.to(weights.dtype), None, None


def _leaf(tensor: Tensor) -> Tensor:
    """An alias whose own derivative can be asked for, whatever the tensor depends on."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


_forward.register_autograd(_differentiate, _save)
_backward.register_autograd(_differentiate_twice, _save)
