"""`sign_code_entropy`: the two exact entropies of lookup-free quantization, without a table of the 2^d codes per row.

N rows, d bits. The softmax of 2 T <x, c> over all codes c in {-s, s}^d is a product over bits, each 1 with probability
sigmoid(a_i), a_i = 4 T s x_i. So a row's entropy is a sum over bits, and the batch's distribution a matrix product (see
`sign_code_mean`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks, _rust, _triton
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops.sign_code_mean import DTYPES, MOST_BITS, check, count, mean, result_dtype, spread, taken

MOST_BITS_OF_A_ROW = 62


def sign_code_entropy(
    x: Tensor,
    inv_temperature: float = 100.0,
    codebook_scale: float = 1.0,
    groups: int = 1,
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-sample entropy E_n H(q_n) and batch entropy H(E_n q_n), in nats, of q_n(c) = softmax over c of 2 T <x_n, c>.

    Args:
        x: [..., d] float32, float64, bfloat16 or float16, 1 <= d <= 62. Spherical codes (binary spherical
            quantization) are those of scale s / sqrt(d) for an x of length 1.
        inv_temperature: T, positive.
        codebook_scale: s, positive.
        groups: into how many runs of bits, of nearly equal length and the longer ones first, x is cut for the batch
            entropy; each run has at most 18 bits.
        mask: bool [...], the rows to take (default: all).

    Returns:
        (per-sample, batch), scalars, float32 (float64 for float64 x). The per-sample entropy is
        mean_n sum_i h(a_ni), a = 4 T s x, h(a) = log(1 + exp(-|a|)) + |a| sigmoid(-|a|). The batch entropy is
        -sum_c m_c log m_c of the mean distribution m [2^d], exact for `groups=1`. With more groups it is the sum of the
        groups' entropies: an **upper bound** on the batch entropy, equal to it only if the groups are independent.
        Neither is clamped: they reach d log 2.

        Both are 0 when no row is taken, and NaN when a row taken holds a NaN, since they are a loss and not a statistic
        that must outlive a bad batch; rows the mask leaves out may hold anything. An infinite x is a certain bit.
        Differentiable, also twice, in x. Memory beyond x and its gradient: 2^18 numbers at most and tables of some
        rows, 2^(d/2) numbers each. Sums accumulate in float64 on a CPU; on a GPU the batch entropy takes a matrix
        product in float32, as `torch.set_float32_matmul_precision` says.

    Raises:
        ValueError: shapes that do not match, more than 62 bits, more than 18 bits in a group, more groups than bits,
            T or s not positive and finite, devices that differ.
        TypeError: x is not floating point, the mask is not bool.

    Yu et al., Language Model Beats Diffusion, 2023 (arXiv 2310.05737).
    """
    rows, chosen, slope = check("sign_code_entropy", x, inv_temperature, codebook_scale, mask)
    _check_bits(x, groups)
    per_sample = _forward(rows, chosen, slope)
    parts = [_entropy(mean(part, chosen, slope)) for part in rows.tensor_split(groups, 1)]
    return per_sample, torch.stack(parts).sum()


def _check_bits(x: Tensor, groups: int) -> None:
    name, bits = "sign_code_entropy", x.shape[-1]
    if not 1 <= bits <= MOST_BITS_OF_A_ROW:
        raise ValueError(f"{name}: x is {_checks.shape(x)}, expected (..., d) with 1 <= d <= {MOST_BITS_OF_A_ROW}")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"{name}: groups is a {type(groups).__name__}, expected an int")
    if not 1 <= groups <= bits:
        raise ValueError(f"{name}: groups is {groups}, expected 1 to d = {bits}")
    if -(-bits // groups) > MOST_BITS:
        raise ValueError(
            f"{name}: groups is {groups}, expected at least {-(-bits // MOST_BITS)} for {bits} bits, {MOST_BITS} a "
            "group; the batch entropy is then an upper bound"
        )


def _entropy(distribution: Tensor) -> Tensor:
    """-sum m log m with 0 log 0 = 0; its slope at 0 is finite, for the probabilities that meet it are 0 too."""
    tiny = torch.finfo(distribution.dtype).tiny
    terms = distribution * distribution.clamp(min=tiny).log()
    exact = torch.float64 if distribution.device.type == "cpu" else distribution.dtype
    return -terms.sum(dtype=exact).to(distribution.dtype)


def _reference(x: Tensor, mask: Tensor | None, slope: float) -> Tensor:
    size = (slope * taken(x, mask).double()).abs()
    factor = torch.exp(-size)
    entropies = torch.where(factor == 0, 0.0, torch.log1p(factor) + size * torch.sigmoid(-size))
    return (taken(entropies, mask).sum() / count(x, mask)).to(result_dtype(x))


def _slope(x: Tensor, slope: float) -> Tensor:
    """d h(slope x) / dx, 0 for an infinite x; differentiable."""
    a = slope * x
    rare = torch.sigmoid(-a.abs())
    return torch.where(rare == 0, 0.0, -slope * a * rare * (1 - rare))


def _reference_backward(x: Tensor, mask: Tensor | None, grad: Tensor, slope: float) -> Tensor:
    slopes = _slope(taken(x, mask).double(), slope) * (grad.double() / count(x, mask))
    return taken(slopes, mask).to(x.dtype).contiguous()


def _rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, str]:
    rows = (x if mask is None else x[mask]).to(result_dtype(x)).contiguous()
    return rows, str(rows.dtype).removeprefix("torch.")


def _rust_forward(x: Tensor, mask: Tensor | None, slope: float) -> Tensor:
    rows, dtype = _rows(x, mask)
    total = _rust.core.sign_code_entropy(dtype, _rust.span(rows), slope, _rust.threads())
    return torch.tensor(total / max(len(rows), 1), dtype=rows.dtype)


def _rust_backward(x: Tensor, mask: Tensor | None, grad: Tensor, slope: float) -> Tensor:
    rows, dtype = _rows(x, mask)
    out = torch.empty_like(rows)
    scale = grad.item() / max(len(rows), 1)
    _rust.core.sign_code_entropy_backward(dtype, _rust.span(rows), scale, slope, _rust.span(out), _rust.threads())
    return spread(out, x, mask)


def _triton_forward(x: Tensor, mask: Tensor | None, slope: float) -> Tensor:
    kernels = _triton.kernels("sign_code_entropy")
    return kernels.forward(x.contiguous(), mask, slope, result_dtype(x)) / count(x, mask)


def _triton_backward(x: Tensor, mask: Tensor | None, grad: Tensor, slope: float) -> Tensor:
    kernels = _triton.kernels("sign_code_entropy")
    return kernels.backward(x.contiguous(), mask, (grad / count(x, mask)).contiguous(), slope)


def _fake(x: Tensor, mask: Tensor | None, slope: float) -> Tensor:
    return x.new_empty((), dtype=result_dtype(x))


def _fake_backward(x: Tensor, mask: Tensor | None, grad: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward = Operation(
    "sign_code_entropy",
    "(Tensor x, Tensor? mask, float slope) -> Tensor",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust_forward, DTYPES),
    triton=Kernel(_triton_forward, DTYPES),
)
_backward = Operation(
    "sign_code_entropy_backward",
    "(Tensor x, Tensor? mask, Tensor grad, float slope) -> Tensor",
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
    """The derivatives of grad . dh/dx, in plain torch: h'' = p (1 - p) (a tanh(a / 2) - 1)."""
    x, mask, outer = ctx.saved_tensors
    values = taken(x, mask).to(outer.dtype)
    scale = taken(grad, mask).to(outer.dtype) / count(x, mask)
    a = ctx.slope * values
    rare = torch.sigmoid(-a.abs())
    curve = torch.where(rare == 0, 0.0, ctx.slope**2 * rare * (1 - rare) * (a * torch.tanh(a / 2) - 1))
    d_x = (outer * scale * curve).to(x.dtype)
    return d_x, None, (scale * _slope(values, ctx.slope)).sum(), None, None


_forward.register_autograd(_differentiate, _save)
_backward.register_autograd(_differentiate_twice, _save)
