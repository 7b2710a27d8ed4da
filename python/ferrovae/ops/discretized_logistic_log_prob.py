"""`discretized_logistic_log_prob`: the log-likelihood of data on even levels of [-1, 1] under independent logistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks, _log_prob, _logistic, _transforms, _triton
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops._rust import core, span, threads

_RUST_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_NAME = "discretized_logistic_log_prob"


def discretized_logistic_log_prob(
    x: Tensor, mean: Tensor, log_scale: Tensor, levels: int = 256, *, batch_dims: int = 1
) -> Tensor:
    """log p(x | mean, scale) = sum_d log(F((x_d + h - m_d) / s_d) - F((x_d - h - m_d) / s_d)), in nats per example.

    F is the logistic distribution function, s = exp(log_scale), and h = 1 / (levels - 1) half the distance of two
    levels. The lowest level takes all the mass below it and the highest all above, so that the levels' probabilities
    sum to 1. Evaluated without subtracting two values of F: within 1e-6 of the logarithm (float32) at any scale.
    (Salimans et al. 2017, PixelCNN++, whose published code approximates small probabilities by the density.)

    Args:
        x: `(N, ...)` data, 2 v / (levels - 1) - 1 for v = 0 .. levels - 1; other values count as the nearest level.
            Leading batch dimensions may be missing or 1: with `batch_dims=2`, means `(S, N, ...)` meet x `(N, ...)`,
            which is not repeated in memory. It gets no gradient.
        mean: `(N, ...)`, floating point, on the device of x. An infinite one leaves all mass to one edge level.
        log_scale: of a shape that broadcasts to that of mean, of its dtype; counts as -88 below that (float32).
            There is no floor: a network that learns it is bounded by its likelihood class.
        levels: 2 to 65536.
        batch_dims: how many leading dimensions of the means to keep; the others are summed over.

    Returns:
        The means' first `batch_dims` dimensions, float32 (float64 for float64 means); 0 where there is nothing to sum
        over, NaN for an example that holds a NaN. Sums over dimensions accumulate in float64 on a CPU.
        Differentiable, also twice, in mean and log_scale.

    Raises:
        TypeError: an argument is no tensor or not floating point, or log_scale's dtype is not that of mean.
        ValueError: shapes that do not match, devices that differ, `levels` or `batch_dims` out of range.
    """
    for label, value in (("x", x), ("mean", mean), ("log_scale", log_scale)):
        _checks.floating(_NAME, label, value)
    _checks.alike(_NAME, "log_scale", log_scale, "mean", mean)
    _checks.same_device(_NAME, "x", x, "mean", mean)
    _logistic.levels(_NAME, levels)
    _log_prob.check_batch_dims(_NAME, batch_dims, mean.ndim, "mean", mean)
    if log_scale.shape != mean.shape:
        _checks.broadcasts(_NAME, "log_scale", log_scale, "mean", mean)
        log_scale = log_scale.expand_as(mean)
    return _forward(mean, log_scale, _log_prob.meeting(_NAME, x, mean.shape, batch_dims, "mean"), levels, batch_dims)


def _reference(mean: Tensor, log_scale: Tensor, x: Tensor, levels: int, batch_dims: int) -> Tensor:
    work, top = _log_prob.work_dtype(mean), levels - 1
    level = _logistic.level(x.to(work), top)
    distance = _logistic.from_mean(level, mean, top)
    return _log_prob.sum_events(_logistic.log_mass(level, distance, log_scale.to(work), top), batch_dims)


def _reference_backward(
    mean: Tensor, log_scale: Tensor, x: Tensor, grad: Tensor, levels: int, batch_dims: int
) -> tuple[Tensor, Tensor]:
    work, top = _log_prob.work_dtype(mean), levels - 1
    level = _logistic.level(x.to(work), top)
    slopes = _logistic.slopes(level, _logistic.from_mean(level, mean, top), log_scale.to(work), top)
    weight = _log_prob.as_columns(grad, mean)
    return (weight * slopes[0]).to(mean.dtype).contiguous(), (weight * slopes[1]).to(mean.dtype).contiguous()


def _rows(mean: Tensor, log_scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, mean and log_scale as the kernels read them: contiguous, a copy only where it must be."""
    x = _log_prob.unexpanded(x)
    if (x.dtype == torch.float64) != (mean.dtype == torch.float64):
        x = x.to(_log_prob.work_dtype(mean))
    return x.contiguous(), mean.contiguous(), log_scale.contiguous()


def _typed(tensor: Tensor) -> tuple[int, int, str]:
    return (*span(tensor), _RUST_TYPES[tensor.dtype])


def _rust(mean: Tensor, log_scale: Tensor, x: Tensor, levels: int, batch_dims: int) -> Tensor:
    x, mean, log_scale = _rows(mean, log_scale, x)
    sizes = levels, mean.shape[batch_dims:].numel()
    out = torch.empty(tuple(mean.shape[:batch_dims]), dtype=_log_prob.work_dtype(mean))
    if mean.dtype == torch.float64:
        spans = span(x), span(mean), span(log_scale)
        core.discretized_logistic_log_prob_f64(spans, sizes, span(out), threads())
    else:
        typed = _typed(x), _typed(mean), _typed(log_scale)
        core.discretized_logistic_log_prob(typed, sizes, span(out), threads())
    return out


def _rust_backward(
    mean: Tensor, log_scale: Tensor, x: Tensor, grad: Tensor, levels: int, batch_dims: int
) -> tuple[Tensor, Tensor]:
    x, mean, log_scale = _rows(mean, log_scale, x)
    sizes, grad = (levels, mean.shape[batch_dims:].numel()), grad.contiguous()
    d_mean, d_log_scale = torch.empty_like(mean), torch.empty_like(mean)
    if mean.dtype == torch.float64:
        spans, out = (span(x), span(mean), span(log_scale)), (span(d_mean), span(d_log_scale))
        core.discretized_logistic_log_prob_backward_f64(spans, sizes, span(grad), out, threads())
    else:
        typed, room = (_typed(x), _typed(mean), _typed(log_scale)), (_typed(d_mean), _typed(d_log_scale))
        core.discretized_logistic_log_prob_backward(typed, sizes, span(grad), room, threads())
    return d_mean, d_log_scale


def _triton_forward(mean: Tensor, log_scale: Tensor, x: Tensor, levels: int, batch_dims: int) -> Tensor:
    x, mean, log_scale = _rows(mean, log_scale, x)
    batch, work = mean.shape[:batch_dims], _log_prob.work_dtype(mean)
    return _triton.kernels(_NAME).forward(x, mean, log_scale, levels, batch, work)


def _triton_backward(
    mean: Tensor, log_scale: Tensor, x: Tensor, grad: Tensor, levels: int, batch_dims: int
) -> tuple[Tensor, Tensor]:
    return _triton.kernels(_NAME).backward(*_rows(mean, log_scale, x), grad.contiguous(), levels)


def _fake(mean: Tensor, log_scale: Tensor, x: Tensor, levels: int, batch_dims: int) -> Tensor:
    return mean.new_empty(mean.shape[:batch_dims], dtype=_log_prob.work_dtype(mean))


def _fake_backward(
    mean: Tensor, log_scale: Tensor, x: Tensor, grad: Tensor, levels: int, batch_dims: int
) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(mean, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


_DTYPES = frozenset(_checks.FLOATS)
_forward = Operation(
    _NAME,
    "(Tensor mean, Tensor log_scale, Tensor x, int levels, int batch_dims) -> Tensor",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust, _DTYPES),
    triton=Kernel(_triton_forward, _DTYPES),
)
_backward = Operation(
    f"{_NAME}_backward",
    "(Tensor mean, Tensor log_scale, Tensor x, Tensor grad, int levels, int batch_dims) -> (Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    rust=Kernel(_rust_backward, _DTYPES),
    triton=Kernel(_triton_backward, _DTYPES),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.levels, ctx.batch_dims, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_mean, d_log_scale = _backward(*ctx.saved_tensors, grad, ctx.levels, ctx.batch_dims, backend=ctx.backend)
    return d_mean, d_log_scale, None, None, None, None


def _differentiate_twice(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
    mean, log_scale, x, grad = ctx.saved_tensors

    def slopes(mean: Tensor, log_scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _reference_backward(mean, log_scale, x, grad, ctx.levels, ctx.batch_dims)

    d_mean, d_log_scale, d_grad = _transforms.differentiate_again(slopes, (mean, log_scale, grad), outer)
    return d_mean, d_log_scale, None, d_grad, None, None, None


_forward.register_autograd(_differentiate, _save)
_backward.register_autograd(_differentiate_twice, _save)
_transforms.register_vmap(_forward, 2)
_transforms.register_vmap(_backward, 2)
