"""`code_sums`: for every code of a codebook, the sum of the rows given to it and how many they are.

H heads, N rows, K codes, D dimensions. What a moving-average codebook, k-means and usage statistics are made of,
without the N x K one-hot matrix, and the same bits from run to run.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks, _rust, _triton
from ferrovae.ops._registry import Kernel, Operation

_DTYPES = frozenset(_checks.FLOATS)


def code_sums(
    x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None = None, *, heads: bool = False
) -> tuple[Tensor, Tensor]:
    """sums[k] = sum of w_n x_n and counts[k] = sum of w_n over the rows n with indices[n] = k.

    Args:
        x: [..., D] float32, float64, bfloat16 or float16; with heads [H, ..., D].
        indices: int64 [...], x's shape without D: -1 to K - 1. A row with index -1 is skipped.
        num_codes: K, at least 1.
        weights: [...] like the indices, floating point, integer or bool: what a row counts (default 1).
        heads: the first dimension of x, indices and weights counts heads, each with a codebook of its own.

    Returns:
        sums [K, D] and counts [K] float32; with heads [H, K, D] and [H, K]. 0 for a code without rows; with N = 0
        all are 0. Counts beyond 2^24 are rounded.

    A row that holds a NaN or an infinity, or whose weight is one, is skipped: it adds to no sum and no count, and its
    gradient is 0. So one bad row never spoils a codebook.

    The same bits from run to run: on a CPU also for any number of threads and instruction set, on a GPU for any
    schedule. A CPU adds in float64 and rounds once. A GPU adds int64 multiples of a power of two that is below 2^-58
    of a code's largest number times its number of rows. (In torch's reference on a GPU, the order is not fixed.)

    Linear in x and in the weights, and differentiable any number of times: d x_n = w_n dsums[k], d w_n = x_n . dsums[k]
    + dcounts[k]. `torch.vmap` treats what it maps over as heads.

    Raises:
        ValueError: shapes that do not match, num_codes below 1, devices that differ; an index outside -1 to K - 1 on a
            CPU. On a GPU that would make the host wait, so such a row is skipped, unless FERROVAE_CHECKS=1 is set.
        TypeError: x is not floating point, the indices are not int64, the weights are complex.
    """
    _check(x, indices, num_codes, weights, heads)
    groups = x.shape[0] if heads else 1
    rows = math.prod(indices.shape[1:] if heads else indices.shape)
    if weights is not None:
        weights = (weights if weights.is_floating_point() else weights.to(torch.float32)).reshape(groups, rows)
    sums, counts = _operation(x.reshape(groups, rows, x.shape[-1]), indices.reshape(groups, rows), weights, num_codes)
    sums, counts = sums.to(torch.float32), counts.to(torch.float32)
    return (sums, counts) if heads else (sums.squeeze(0), counts.squeeze(0))


def _check(x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None, heads: bool) -> None:
    name = "code_sums"
    _checks.floating(name, "x", x)
    if _checks.tensor(name, "indices", indices).dtype != torch.int64:
        raise TypeError(f"{name}: indices are {indices.dtype}, expected int64")
    least = 2 if heads else 1
    if x.ndim < least:
        raise ValueError(f"{name}: x is {_checks.shape(x)}, expected ({'H, ' if heads else ''}..., D)")
    if isinstance(num_codes, bool) or not isinstance(num_codes, int | torch.SymInt):
        raise TypeError(f"{name}: num_codes is a {type(num_codes).__name__}, expected an int")
    if num_codes < 1:
        raise ValueError(f"{name}: num_codes is {num_codes}, expected at least 1")
    expected = tuple(x.shape[:-1])
    for label, value in (("indices", indices), ("weights", weights)):
        if value is None:
            continue
        if _checks.tensor(name, label, value).shape != x.shape[:-1]:
            raise ValueError(
                f"{name}: {label} is {_checks.shape(value)}, expected {expected} to match x {_checks.shape(x)}"
            )
        _checks.same_device(name, label, value, "x", x)
    if weights is not None and weights.dtype.is_complex:
        raise TypeError(f"{name}: weights are {weights.dtype}, expected floating point, integers or bool")


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _used(x: Tensor, indices: Tensor, weights: Tensor | None, num_codes: int) -> Tensor:
    """Which rows count: bool [H, N]."""
    used = (indices >= 0) & (indices < num_codes) & x.isfinite().all(-1)
    return used if weights is None else used & weights.isfinite()


def _outside(indices: Tensor, num_codes: int) -> None:
    """`ValueError` for the first index out of range; waits for the device."""
    outside = (indices < -1) | (indices >= num_codes)
    if bool(outside.any()):
        head, row = outside.nonzero()[0].tolist()
        where = f"row {row}" + (f" of head {head}" if len(indices) > 1 else "")
        raise ValueError(
            f"code_sums: indices hold {int(indices[head, row])} in {where}, expected -1 to {num_codes - 1}"
        )


def _checks_wanted() -> bool:
    return os.environ.get("FERROVAE_CHECKS", "0") == "1"


def _reference(x: Tensor, indices: Tensor, weights: Tensor | None, num_codes: int) -> tuple[Tensor, Tensor]:
    """The meaning: x [H, N, D], indices and weights [H, N] -> [H, K, D], [H, K]; float64 inside."""
    if x.device.type == "cpu" or _checks_wanted():
        _outside(indices, num_codes)
    heads, _, dims = x.shape
    used = _used(x, indices, weights, num_codes)
    weight = used.double() if weights is None else torch.where(used, weights, 0.0).double()
    values = torch.where(used.unsqueeze(-1), x, 0.0).double() * weight.unsqueeze(-1)
    first = num_codes * torch.arange(heads, device=x.device).unsqueeze(-1)
    # Rows that do not count add nothing, to the first code.
    place = (torch.where(used, indices, 0) + first).flatten()
    counts = values.new_zeros(heads * num_codes).index_add_(0, place, weight.flatten())
    sums = values.new_zeros(heads * num_codes, dims).index_add_(0, place, values.flatten(0, 1))
    dtype = _result_dtype(x)
    return sums.view(heads, num_codes, dims).to(dtype), counts.view(heads, num_codes).to(dtype)


def _rust_kernel(x: Tensor, indices: Tensor, weights: Tensor | None, num_codes: int) -> tuple[Tensor, Tensor]:
    x, indices = x.contiguous(), indices.contiguous()
    weights = None if weights is None else weights.double().contiguous()
    heads, rows, dims = x.shape
    # Zeros that the system gives: of a large codebook, only the codes that are used are ever written.
    sums = torch.zeros((heads, num_codes, dims), dtype=_result_dtype(x))
    counts = torch.zeros((heads, num_codes), dtype=sums.dtype)
    dtype = str(x.dtype).removeprefix("torch.")
    spans = _rust.span(x), _rust.span(indices), None if weights is None else _rust.span(weights)
    sizes = (heads, rows, num_codes, dims)
    _rust.core.code_sums(dtype, *spans, sizes, _rust.span(sums), _rust.span(counts), _rust.threads())
    return sums, counts


def _triton_kernel(x: Tensor, indices: Tensor, weights: Tensor | None, num_codes: int) -> tuple[Tensor, Tensor]:
    if _checks_wanted():
        _outside(indices, num_codes)
    weights = None if weights is None else weights.contiguous()
    kernels = _triton.kernels("code_sums")
    return kernels.code_sums(x.contiguous(), indices.contiguous(), weights, num_codes, _result_dtype(x))


def _fake(x: Tensor, indices: Tensor, weights: Tensor | None, num_codes: int) -> tuple[Tensor, Tensor]:
    heads, _, dims = x.shape
    dtype = _result_dtype(x)
    return x.new_empty((heads, num_codes, dims), dtype=dtype), x.new_empty((heads, num_codes), dtype=dtype)


_operation = Operation(
    "code_sums",
    "(Tensor x, Tensor indices, Tensor? weights, SymInt num_codes) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust_kernel, _DTYPES),
    triton=Kernel(_triton_kernel, _DTYPES),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, indices, weights, ctx.num_codes, _ = inputs
    ctx.save_for_backward(x, indices, weights)


def _differentiate(ctx: Any, d_sums: Tensor, d_counts: Tensor) -> tuple[Tensor | None, ...]:
    """What each row finds at its code, in plain torch, so that it has derivatives itself."""
    x, indices, weights = ctx.saved_tensors
    used = _used(x, indices, weights, ctx.num_codes)
    place = torch.where(used, indices, 0)
    head = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
    found = torch.where(used.unsqueeze(-1), d_sums[head, place], 0.0)
    d_x = d_weights = None
    if ctx.needs_input_grad[0]:
        weight = 1.0 if weights is None else torch.where(used, weights, 0.0).to(found.dtype).unsqueeze(-1)
        d_x = (found * weight).to(x.dtype)
    if ctx.needs_input_grad[2]:
        row = torch.where(used.unsqueeze(-1), x, 0.0).to(found.dtype)
        d_weights = ((row * found).sum(-1) + torch.where(used, d_counts[head, place], 0.0)).to(weights.dtype)
    return d_x, None, d_weights, None, None


def _batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """`vmap`: the mapped dimension joins the heads."""
    size = info.batch_size

    def joined(value: Tensor | None, dim: int | None) -> Tensor | None:
        if value is None:
            return None
        value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.flatten(0, 1)

    x, indices, weights, num_codes, backend = args
    tensors = [joined(value, dim) for value, dim in zip((x, indices, weights), in_dims[:3], strict=True)]
    results = _operation(*tensors, num_codes, backend=backend)
    sums, counts = (result.unflatten(0, (size, -1)) for result in results)
    return (sums, counts), (0, 0)


_operation.register_autograd(_differentiate, _save)
_operation.register_vmap(_batched)
