"""`bernoulli_log_prob`: the log-likelihood of data in [0, 1] under independent Bernoullis given by logits."""

from __future__ import annotations

from typing import Any

import torch

from ferrovae.ops import _transforms, _triton
from ferrovae.ops._checks import FLOATS
from ferrovae.ops._log_prob import as_columns, checked, sum_events, sum_to, unexpanded, work_dtype
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops._rust import core, span, threads

_RUST_TYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
}


def bernoulli_log_prob(x: torch.Tensor, logits: torch.Tensor, *, batch_dims: int = 1) -> torch.Tensor:
    """log p(x | logits) = sum_d x_d l_d - max(l_d, 0) - log(1 + exp(-|l_d|)), in nats per example.

    Args:
        x: `(N, ...)` data in [0, 1] (0 and 1 for the probability of an outcome), bool, uint8 or floating point.
            Leading batch dimensions may be missing or 1: with `batch_dims=2`, logits `(S, N, ...)` meet x
            `(N, ...)`, which is not repeated in memory.
        logits: `(N, ...)`, floating point, on the device of x. Infinite ones are certainties: x = 0 at -inf adds 0,
            at +inf it makes the result -inf.
        batch_dims: how many leading dimensions of the logits to keep; the others are summed over.

    Returns:
        The logits' first `batch_dims` dimensions, float32 (float64 for float64 logits); 0 where there is nothing to
        sum over, NaN for an example that holds a NaN. Sums over dimensions accumulate in float64 on a CPU.
        Differentiable, also twice, in the logits (gradient x - sigmoid(l)) and in a floating-point x (gradient l).

    Raises:
        TypeError: the logits are not floating point, or an argument is no tensor, or x is complex.
        ValueError: shapes that do not match, devices that differ, `batch_dims` outside 0..logits.ndim.
    """
    return _forward(logits, checked("bernoulli_log_prob", x, "logits", logits, batch_dims), batch_dims)


def _reference(logits: torch.Tensor, x: torch.Tensor, batch_dims: int) -> torch.Tensor:
    work = work_dtype(logits)
    logits, x = logits.to(work), x.to(work)
    error = x - (logits > 0).to(work)  # x l - max(l, 0) = error l, without cancellation
    linear = torch.where(error == 0, 0.0, error * logits)  # 0 times infinity is 0 here
    return sum_events(linear - torch.log1p(torch.exp(-logits.abs())), batch_dims)


def _reference_backward(logits: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, batch_dims: int) -> torch.Tensor:
    work = work_dtype(logits)
    rest = torch.sigmoid(-logits.abs().to(work))  # sigmoid(l) is rest, or 1 - rest where l > 0
    error = x.to(work) - (logits > 0).to(work)
    return (as_columns(grad, logits) * (error + torch.where(logits > 0, rest, -rest))).to(logits.dtype)


def _rows(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What Rust reads x as: contiguous, of a type it knows, a copy only where it must be."""
    x = unexpanded(x)
    if logits.dtype == torch.float64:
        return x.to(torch.float64).contiguous()
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return (x if x.dtype in _RUST_TYPES else x.to(torch.float32)).contiguous()


def _typed(tensor: torch.Tensor) -> tuple[int, int, str]:
    return (*span(tensor), _RUST_TYPES[tensor.dtype])


def _rust(logits: torch.Tensor, x: torch.Tensor, batch_dims: int) -> torch.Tensor:
    logits, x, columns = logits.contiguous(), _rows(x, logits), logits.shape[batch_dims:].numel()
    # A tuple: torch.empty takes 3 us longer for a torch.Size.
    out = torch.empty(tuple(logits.shape[:batch_dims]), dtype=work_dtype(logits))
    if logits.dtype == torch.float64:
        core.bernoulli_log_prob_f64(span(logits), span(x), columns, span(out), threads())
    else:
        core.bernoulli_log_prob(_typed(logits), _typed(x), columns, span(out), threads())
    return out


def _rust_backward(logits: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, batch_dims: int) -> torch.Tensor:
    logits, x, columns = logits.contiguous(), _rows(x, logits), logits.shape[batch_dims:].numel()
    grad, out = grad.contiguous(), torch.empty_like(logits)
    if logits.dtype == torch.float64:
        core.bernoulli_log_prob_backward_f64(span(logits), span(x), span(grad), columns, span(out), threads())
    else:
        core.bernoulli_log_prob_backward(_typed(logits), _typed(x), span(grad), columns, _typed(out), threads())
    return out


def _triton_x(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    x = unexpanded(x)
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return (x if x.dtype in FLOATS or x.dtype == torch.uint8 else x.to(work_dtype(logits))).contiguous()


def _triton_forward(logits: torch.Tensor, x: torch.Tensor, batch_dims: int) -> torch.Tensor:
    batch, work = logits.shape[:batch_dims], work_dtype(logits)
    return _triton.kernels("bernoulli_log_prob").forward(logits.contiguous(), _triton_x(x, logits), batch, work)


def _triton_backward(logits: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, batch_dims: int) -> torch.Tensor:
    tensors = (logits.contiguous(), _triton_x(x, logits), grad.contiguous())
    return _triton.kernels("bernoulli_log_prob").backward(*tensors)


def _fake(logits: torch.Tensor, x: torch.Tensor, batch_dims: int) -> torch.Tensor:
    return logits.new_empty(logits.shape[:batch_dims], dtype=work_dtype(logits))


def _fake_backward(logits: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, batch_dims: int) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_forward = Operation(
    "bernoulli_log_prob",
    "(Tensor logits, Tensor x, int batch_dims) -> Tensor",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust, frozenset(FLOATS)),
    triton=Kernel(_triton_forward, frozenset(FLOATS)),
)
_backward = Operation(
    "bernoulli_log_prob_backward",
    "(Tensor logits, Tensor x, Tensor grad, int batch_dims) -> Tensor",
    reference=lambda *args: _reference_backward(*args).contiguous(),
    fake=_fake_backward,
    rust=Kernel(_rust_backward, frozenset(FLOATS)),
    triton=Kernel(_triton_backward, frozenset(FLOATS)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.batch_dims, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    logits, x = ctx.saved_tensors
    d_logits = d_x = None
    if ctx.needs_input_grad[0]:
        d_logits = _backward(logits, x, grad, ctx.batch_dims, backend=ctx.backend)
    if ctx.needs_input_grad[1]:
        d_x = sum_to(as_columns(grad, logits) * logits, x)
    return d_logits, d_x, None, None


def _differentiate_twice(ctx: Any, grad_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The derivatives of g (x - sigmoid(l)), in plain torch, so that they have derivatives themselves."""
    logits, x, grad = ctx.saved_tensors
    work = work_dtype(logits)
    outer, logit = grad_grad.to(work), logits.to(work)
    d_logits = d_x = d_grad = None
    if ctx.needs_input_grad[0]:
        d_logits = (-outer * as_columns(grad, logits) * torch.sigmoid(logit) * torch.sigmoid(-logit)).to(logits.dtype)
    if ctx.needs_input_grad[1]:
        d_x = sum_to(outer * as_columns(grad, logits), x)
    if ctx.needs_input_grad[2]:
        d_grad = sum_events(outer * (x.to(work) - torch.sigmoid(logit)), ctx.batch_dims)
    return d_logits, d_x, d_grad, None, None


_forward.register_autograd(_differentiate, _save)
_backward.register_autograd(_differentiate_twice, _save)
_transforms.register_vmap(_forward, 1)
_transforms.register_vmap(_backward, 1)
