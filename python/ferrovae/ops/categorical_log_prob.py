"""`categorical_log_prob`: the log-probability of classes under independent categoricals given by logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks
from ferrovae.ops._log_prob import as_columns, fitting, sum_events, unexpanded, work_dtype
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops._rust import core, span, threads

_NAME = "categorical_log_prob"
_TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
    torch.int64: "int64",
}


def categorical_log_prob(x: Tensor, logits: Tensor, *, batch_dims: int = 1) -> Tensor:
    """log p(x | logits) = sum_d l[x_d, d] - log(sum_c exp(l[c, d])), in nats per example.

    Args:
        x: `(N, ...)` classes from 0 to C - 1, int64 or another integer dtype (bool for two classes). Leading batch
            dimensions may be missing or 1: with `batch_dims=2`, logits `(S, N, C, ...)` meet x `(N, ...)`, which is
            not repeated in memory.
        logits: `(N, C, ...)`, floating point, on the device of x; classes on the first dimension behind the batch.
            One at -inf is a class that cannot be; one at +inf is certain, several share the mass.
        batch_dims: how many leading dimensions of the logits to keep; the others are summed over.

    Returns:
        The logits' first `batch_dims` dimensions, float32 (float64 for float64 logits); 0 where there is nothing to
        sum over, NaN for an example that holds a NaN or only -inf. Sums accumulate in float64 on a CPU, and a
        confident right answer keeps its relative precision. Differentiable, to any order, in the logits.

    Raises:
        TypeError: x is not of an integer dtype, or looks one-hot; logits are not floating point; no tensor.
        ValueError: shapes that do not match, no class, devices that differ, `batch_dims` outside 0..logits.ndim - 1;
            on a CPU also a class of x outside 0..C - 1 (elsewhere the example is NaN: looking would make the device
            wait).
    """
    return _forward(logits, _checked(x, logits, batch_dims), batch_dims)


def _checked(x: Any, logits: Any, batch_dims: int) -> Tensor:
    """x without leading dimensions of size 1 that the logits do not have."""
    _checks.tensor(_NAME, "x", x)
    _checks.floating(_NAME, "logits", logits)
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"{_NAME}: x is {x.dtype}, expected integer classes, not probabilities or one-hot vectors")
    _checks.same_device(_NAME, "x", x, "logits", logits)
    if not 0 <= batch_dims < logits.ndim:
        raise ValueError(
            f"{_NAME}: batch_dims is {batch_dims}, expected 0 to {logits.ndim - 1} for logits "
            f"{_checks.shape(logits)}, whose dimension behind the batch is the classes"
        )
    if logits.shape[batch_dims] == 0:
        raise ValueError(
            f"{_NAME}: logits are {_checks.shape(logits)}, expected at least one class on dimension {batch_dims}"
        )
    due = logits.shape[:batch_dims] + logits.shape[batch_dims + 1 :]
    squeezed = fitting(x, due, batch_dims)
    if squeezed is not None:
        return squeezed
    if x.shape == logits.shape:
        raise TypeError(
            f"{_NAME}: x is {_checks.shape(x)} like the logits, expected classes {tuple(due)}, not one-hot vectors"
        )
    raise ValueError(
        f"{_NAME}: x is {_checks.shape(x)}, expected {tuple(due)} to match logits {_checks.shape(logits)}; of the "
        f"{batch_dims} batch dimensions leading ones may be 1, all but one may be missing"
    )


def _shares(logits: Tensor, batch_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits less the largest one, their exponentials, and the sum of these, all of dim `batch_dims`."""
    logits = logits.to(work_dtype(logits))
    most = logits.amax(batch_dims, keepdim=True)
    below = torch.where(logits == most, 0.0, logits - most)  # equal infinities differ by 0
    terms = torch.exp(below)
    exact = torch.float64 if logits.device.type == "cpu" else logits.dtype
    total = terms.sum(batch_dims, keepdim=True, dtype=exact)
    return below, terms, torch.where(most == -math.inf, math.nan, total)


def _index(x: Tensor, logits: Tensor, batch_dims: int) -> Tensor:
    """Class indices `(N, 1, ...)`."""
    events = logits.shape[batch_dims + 1 :]
    return x.to(torch.int64).expand(logits.shape[:batch_dims] + events).unsqueeze(batch_dims)


def _classes(x: Tensor, logits: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    """Class indices, and which of them are none; on a CPU `ValueError` when there is such a one."""
    index = _index(x, logits, batch_dims)
    count = logits.shape[batch_dims]
    outside = (index < 0) | (index >= count)
    if logits.device.type == "cpu" and bool(outside.any()):
        value = int(index[outside][0])
        raise ValueError(f"{_NAME}: x holds {value}, expected classes from 0 to {count - 1}")
    return index.clamp(0, count - 1), outside


def _reference(logits: Tensor, x: Tensor, batch_dims: int) -> Tensor:
    index, outside = _classes(x, logits, batch_dims)
    below, _, total = _shares(logits, batch_dims)
    values = below.gather(batch_dims, index).to(total.dtype) - torch.log(total)
    values = torch.where(outside, math.nan, values).squeeze(batch_dims)
    return sum_events(values, batch_dims).to(work_dtype(logits))


def _reference_backward(logits: Tensor, x: Tensor, grad: Tensor, batch_dims: int) -> Tensor:
    index, outside = _classes(x, logits, batch_dims)
    _, terms, total = _shares(logits, batch_dims)
    slopes = -terms / total
    # 1 less a share near 1 would lose its digits
    rest = (total - terms.gather(batch_dims, index)).clamp_min(0) / total
    slopes = slopes.scatter(batch_dims, index, torch.where(outside, math.nan, rest).to(slopes.dtype))
    return (as_columns(grad, logits) * slopes).to(logits.dtype).contiguous()


def _typed(tensor: Tensor) -> tuple[int, int, str]:
    return (*span(tensor), _TYPES[tensor.dtype])


def _rows(x: Tensor) -> Tensor:
    """What Rust reads x as: contiguous, of a type it knows, a copy only where it must be."""
    x = unexpanded(x)
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return (x if x.dtype == torch.uint8 else x.to(torch.int64)).contiguous()


def _broadcast(x: Tensor, logits: Tensor, batch_dims: int) -> Tensor:
    """x with whole rows: dimensions of 1 behind its first are expanded."""
    due = logits.shape[:batch_dims] + logits.shape[batch_dims + 1 :]
    missing = len(due) - x.ndim
    while missing < batch_dims and x.shape[0] == 1:
        x, missing = x[0], missing + 1
    return x.expand(due[missing:])


def _sizes(logits: Tensor, batch_dims: int) -> tuple[int, int]:
    return logits.shape[batch_dims], logits.shape[batch_dims + 1 :].numel()


def _rust(logits: Tensor, x: Tensor, batch_dims: int) -> Tensor:
    logits, x = logits.contiguous(), _rows(_broadcast(x, logits, batch_dims))
    out = torch.empty(logits.shape[:batch_dims], dtype=work_dtype(logits))
    core.categorical_log_prob(_typed(logits), _typed(x), _sizes(logits, batch_dims), _typed(out), threads())
    return out


def _rust_backward(logits: Tensor, x: Tensor, grad: Tensor, batch_dims: int) -> Tensor:
    logits, x = logits.contiguous(), _rows(_broadcast(x, logits, batch_dims))
    grad, out = grad.contiguous(), torch.empty_like(logits)
    sizes = _sizes(logits, batch_dims)
    core.categorical_log_prob_backward(_typed(logits), _typed(x), sizes, _typed(grad), _typed(out), threads())
    return out


_forward = Operation(
    _NAME,
    "(Tensor logits, Tensor x, int batch_dims) -> Tensor",
    reference=_reference,
    fake=lambda logits, x, batch_dims: logits.new_empty(logits.shape[:batch_dims], dtype=work_dtype(logits)),
    rust=Kernel(_rust, frozenset(_checks.FLOATS)),
)
_backward = Operation(
    f"{_NAME}_backward",
    "(Tensor logits, Tensor x, Tensor grad, int batch_dims) -> Tensor",
    reference=_reference_backward,
    fake=lambda logits, x, grad, batch_dims: torch.empty_like(logits, memory_format=torch.contiguous_format),
    rust=Kernel(_rust_backward, frozenset(_checks.FLOATS)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.batch_dims, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, x = ctx.saved_tensors
    return _backward(logits, x, grad, ctx.batch_dims, backend=ctx.backend), None, None, None


def _differentiate_twice(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    """The derivatives of g ([c = x] - softmax(l)), in plain torch, so that they have derivatives themselves."""
    logits, x, grad = ctx.saved_tensors
    work = work_dtype(logits)
    outer, shares = grad_grad.to(work), torch.softmax(logits.to(work), ctx.batch_dims)
    mean = (shares * outer).sum(ctx.batch_dims, keepdim=True)
    d_logits = d_grad = None
    if ctx.needs_input_grad[0]:
        d_logits = (as_columns(grad, logits) * shares * (mean - outer)).to(logits.dtype)
    if ctx.needs_input_grad[2]:
        index = _index(x, logits, ctx.batch_dims).clamp(0, logits.shape[ctx.batch_dims] - 1)
        chosen = outer.gather(ctx.batch_dims, index) - mean
        d_grad = sum_events(chosen.squeeze(ctx.batch_dims), ctx.batch_dims)
    return d_logits, None, d_grad, None, None


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    """One more batch dimension, in front."""
    *tensors, batch_dims, backend = args
    logits, x, *grad = (
        tensor.movedim(dim, 0) if dim is not None else tensor[None]
        for tensor, dim in zip(tensors, in_dims, strict=False)
    )
    missing = logits.ndim - 1 - x.ndim
    x = x.reshape(x.shape[:1] + (1,) * missing + x.shape[1:])
    logits, *grad = (tensor.expand(info.batch_size, *tensor.shape[1:]) for tensor in (logits, *grad))
    operation = _backward if grad else _forward
    return operation(logits, x, *grad, batch_dims + 1, backend=backend), 0


_forward.register_autograd(_differentiate, _save)
_backward.register_autograd(_differentiate_twice, _save)
_forward.register_vmap(_vmap)
_backward.register_vmap(_vmap)
