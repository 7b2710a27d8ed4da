"""The registered operations behind `reparameterize_kl`: reference, backends, gradients.

Rows: mean and logvar are [N, O, I], strided views of an example's D = O I columns (O = 1 for separate tensors); z is
[S, N, D]; kl is [N], or [N, D] elementwise. With std = exp(logvar / 2), var = exp(logvar):

    z = mean + std eps                     kl = 1/2 sum(mean^2 + var - 1 - logvar)
    dmean = sum_s dz + dkl mean            dlogvar = 1/2 (std sum_s dz eps + dkl (var - 1))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks, _philox, _rust, _triton
from ferrovae.ops._registry import Kernel, Operation


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _columns(per_example: Tensor) -> Tensor:
    """kl's gradient [N] or [N, D] as [N, 1] or [N, D]."""
    return per_example if per_example.ndim == 2 else per_example.unsqueeze(1)


# --- reference -----------------------------------------------------------------------------------------------------


def _noise(like: Tensor, seed: Tensor, example_ids: Tensor | None, samples: int, first: int) -> Tensor:
    """eps [S, N, D] for like [N, D]."""
    if example_ids is None:
        example_ids = torch.arange(like.shape[0], device=like.device)
    numbers = torch.arange(first, first + samples, device=like.device)
    return _philox.normals(seed, example_ids, numbers, like.shape[1]).to(like.dtype)


def _reference(
    mean: Tensor, logvar: Tensor, seed: Tensor, example_ids: Tensor | None, samples: int, first: int, elementwise: bool
) -> tuple[Tensor, Tensor]:
    dtype, work = mean.dtype, _work(mean.dtype)
    mean, logvar = mean.to(work).flatten(1), logvar.to(work).flatten(1)
    eps = _noise(mean, seed, example_ids, samples, first)
    z = (mean + torch.exp(logvar * 0.5) * eps).to(dtype)
    terms = 0.5 * (mean.square() + (torch.expm1(logvar) - logvar))
    if elementwise:
        return z, terms
    return z, terms.sum(1, dtype=torch.float64 if mean.device.type == "cpu" else work).to(work)


def _reference_backward(
    mean: Tensor,
    logvar: Tensor,
    dz: Tensor | None,
    dkl: Tensor | None,
    seed: Tensor,
    example_ids: Tensor | None,
    samples: int,
    first: int,
    dmean: Tensor,
    dlogvar: Tensor,
) -> None:
    """Write the gradients into dmean and dlogvar [N, O, I]."""
    work = _work(mean.dtype)
    shape = mean.shape
    mean, logvar = mean.to(work).flatten(1), logvar.to(work).flatten(1)
    of_mean, of_logvar = torch.zeros_like(mean), torch.zeros_like(mean)
    if dz is not None:
        dz = dz.to(work)
        eps = _noise(mean, seed, example_ids, samples, first)
        of_mean += dz.sum(0)
        of_logvar += torch.exp(logvar * 0.5) * (dz * eps).sum(0)
    if dkl is not None:
        of_mean += _columns(dkl) * mean
        of_logvar += _columns(dkl) * torch.expm1(logvar)
    dmean.copy_(of_mean.view(shape))
    dlogvar.copy_((of_logvar * 0.5).view(shape))


# --- Triton --------------------------------------------------------------------------------------------------------


def _unit_stride(rows: Tensor) -> Tensor:
    """Rows whose columns lie side by side; a copy where they do not."""
    return rows if rows.shape[2] <= 1 or rows.stride(2) == 1 else rows.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _triton_forward(mean: Tensor, logvar: Tensor, seed: Tensor, example_ids: Tensor | None, *rest: Any) -> Any:
    kernels = _triton.kernels("reparameterize_kl")
    return kernels.forward(_unit_stride(mean), _unit_stride(logvar), seed, _contiguous(example_ids), *rest)


def _triton_backward(
    mean: Tensor,
    logvar: Tensor,
    dz: Tensor | None,
    dkl: Tensor | None,
    seed: Tensor,
    example_ids: Tensor | None,
    *rest: Any,
) -> None:
    tensors = (_unit_stride(mean), _unit_stride(logvar), _contiguous(dz), _contiguous(dkl), seed)
    _triton.kernels("reparameterize_kl").backward(*tensors, _contiguous(example_ids), *rest)


# --- Rust ----------------------------------------------------------------------------------------------------------


def _strided(rows: Tensor) -> tuple[tuple[int, int], int, int]:
    """Span of all memory from the first to the last element, and the strides of examples and segments."""
    examples, segments, inner = rows.shape
    across, along = rows.stride()[:2]
    extent = (examples - 1) * across + (segments - 1) * along + inner if rows.numel() else 0
    return (rows.data_ptr(), extent), across, along


def _span(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else _rust.span(tensor)


def _rust_forward(
    mean: Tensor, logvar: Tensor, seed: Tensor, example_ids: Tensor | None, samples: int, first: int, elementwise: bool
) -> tuple[Tensor, Tensor]:
    mean, logvar, example_ids = _unit_stride(mean), _unit_stride(logvar), _contiguous(example_ids)
    examples, columns = mean.shape[0], mean.shape[1] * mean.shape[2]
    z = torch.empty((samples, examples, columns), dtype=mean.dtype, device=mean.device)
    kl = torch.empty((examples, columns) if elementwise else examples, dtype=_work(mean.dtype), device=mean.device)
    _rust.core.reparameterize_kl(
        str(mean.dtype).removeprefix("torch."),
        list(mean.shape),
        _strided(mean),
        _strided(logvar),
        (int(seed), _span(example_ids), samples, first),
        _rust.span(z),
        _rust.span(kl),
        elementwise,
        _rust.threads(),
    )
    return z, kl


def _rust_backward(
    mean: Tensor,
    logvar: Tensor,
    dz: Tensor | None,
    dkl: Tensor | None,
    seed: Tensor,
    example_ids: Tensor | None,
    samples: int,
    first: int,
    dmean: Tensor,
    dlogvar: Tensor,
) -> None:
    together = not dmean.is_contiguous()  # the halves of moments, whose memory begins where dmean does
    mean, logvar, example_ids = _unit_stride(mean), _unit_stride(logvar), _contiguous(example_ids)
    dz, dkl = _contiguous(dz), _contiguous(dkl)
    _rust.core.reparameterize_kl_backward(
        str(mean.dtype).removeprefix("torch."),
        list(mean.shape),
        _strided(mean),
        _strided(logvar),
        (int(seed), _span(example_ids), samples, first),
        _span(dz),
        _span(dkl),
        dkl is not None and dkl.ndim == 2,
        (dmean.data_ptr(), dmean.numel() * (2 if together else 1)),
        None if together else _rust.span(dlogvar),
        _rust.threads(),
    )


# --- separate tensors and moments ----------------------------------------------------------------------------------


def _pair(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on mean and logvar [N, D]."""
    return lambda mean, logvar, *rest: run(mean.unsqueeze(1), logvar.unsqueeze(1), *rest)


def _pair_backward(run: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def backward(mean: Tensor, logvar: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dmean, dlogvar = (torch.empty(mean.shape, dtype=mean.dtype, device=mean.device) for _ in range(2))
        run(*(rows.unsqueeze(1) for rows in (mean, logvar)), *rest, dmean.unsqueeze(1), dlogvar.unsqueeze(1))
        return dmean, dlogvar

    return backward


def _moments(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on moments [N, O, 2, I]."""
    return lambda moments, *rest: run(*moments.unbind(2), *rest)


def _moments_backward(run: Callable[..., None]) -> Callable[..., Tensor]:
    def backward(moments: Tensor, *rest: Any) -> Tensor:
        dmoments = torch.empty(moments.shape, dtype=moments.dtype, device=moments.device)
        run(*moments.unbind(2), *rest, *dmoments.unbind(2))
        return dmoments

    return backward


def _fake(
    mean: Tensor, logvar: Tensor, seed: Tensor, example_ids: Tensor | None, samples: int, first: int, elementwise: bool
) -> tuple[Tensor, Tensor]:
    examples, columns = mean.shape[0], mean.shape[1] * mean.shape[2]
    kl = mean.new_empty((examples, columns) if elementwise else (examples,), dtype=_work(mean.dtype))
    return mean.new_empty((samples, examples, columns)), kl


def _fake_backward(*args: Any) -> None:
    """Nothing: the gradients are allocated, as ever."""


_FLOATS = frozenset(_checks.FLOATS)
_TRITON_FLOATS = _FLOATS - {torch.float64}
_DRAWS = "Tensor seed, Tensor? example_ids, int samples, int first"
_PAIR, _MOMENTS = "Tensor mean, Tensor logvar", "Tensor moments"

from_pair = Operation(
    "reparameterize_kl",
    f"({_PAIR}, {_DRAWS}, bool elementwise) -> (Tensor, Tensor)",
    reference=_pair(_reference),
    fake=_pair(_fake),
    rust=Kernel(_pair(_rust_forward), _FLOATS),
    triton=Kernel(_pair(_triton_forward), _TRITON_FLOATS),
)
from_moments = Operation(
    "reparameterize_kl_from_moments",
    f"({_MOMENTS}, {_DRAWS}, bool elementwise) -> (Tensor, Tensor)",
    reference=_moments(_reference),
    fake=_moments(_fake),
    rust=Kernel(_moments(_rust_forward), _FLOATS),
    triton=Kernel(_moments(_triton_forward), _TRITON_FLOATS),
)
_from_pair_backward = Operation(
    "reparameterize_kl_backward",
    f"({_PAIR}, Tensor? dz, Tensor? dkl, {_DRAWS}) -> (Tensor, Tensor)",
    reference=_pair_backward(_reference_backward),
    fake=_pair_backward(_fake_backward),
    rust=Kernel(_pair_backward(_rust_backward), _FLOATS),
    triton=Kernel(_pair_backward(_triton_backward), _TRITON_FLOATS),
)
_from_moments_backward = Operation(
    "reparameterize_kl_from_moments_backward",
    f"({_MOMENTS}, Tensor? dz, Tensor? dkl, {_DRAWS}) -> Tensor",
    reference=_moments_backward(_reference_backward),
    fake=_moments_backward(_fake_backward),
    rust=Kernel(_moments_backward(_rust_backward), _FLOATS),
    triton=Kernel(_moments_backward(_triton_backward), _TRITON_FLOATS),
)


# --- gradients -----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, seed, example_ids, samples, first, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seed, example_ids)
    ctx.rest = samples, first, backend


def _differentiate(operation: Operation) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, seed, example_ids = ctx.saved_tensors
        samples, first, backend = ctx.rest
        grads = operation(*tensors, dz, dkl, seed, example_ids, samples, first, backend=backend)
        return *((grads,) if isinstance(grads, Tensor) else grads), *[None] * 6

    return backward


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, seed, example_ids, samples, first, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seed, example_ids)
    ctx.rest = samples, first, backend


def _differentiate_pair_twice(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
    mean, logvar, *rest = ctx.saved_tensors
    return *_second_order(mean, logvar, *rest, *ctx.rest, *outer), *[None] * 5


def _differentiate_moments_twice(ctx: Any, outer: Tensor | None) -> tuple[Tensor | None, ...]:
    moments, *rest = ctx.saved_tensors
    if outer is None:
        return (None,) * 8
    halves = (half.flatten(1) for half in (*moments.unbind(2), *outer.unbind(2)))
    mean, logvar, *outers = halves
    dmean, dlogvar, ddz, ddkl = _second_order(mean, logvar, *rest, *ctx.rest, *outers)
    of_halves = [(torch.zeros_like(mean) if half is None else half) for half in (dmean, dlogvar)]
    half_shape = moments.shape[0], moments.shape[1], moments.shape[3]
    return torch.stack([half.reshape(half_shape) for half in of_halves], 2), ddz, ddkl, *[None] * 5


def _second_order(
    mean: Tensor,
    logvar: Tensor,
    dz: Tensor | None,
    dkl: Tensor | None,
    seed: Tensor,
    example_ids: Tensor | None,
    samples: int,
    first: int,
    backend: str,
    outer_mean: Tensor | None,
    outer_logvar: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (dmean, dlogvar) in mean, logvar, dz, dkl; plain torch, so that they have gradients themselves."""
    dtype, work = mean.dtype, _work(mean.dtype)
    mean, logvar = mean.to(work), logvar.to(work)
    g_mean, g_logvar = (torch.zeros_like(mean) if g is None else g.to(work) for g in (outer_mean, outer_logvar))
    half = 0.5 * g_logvar
    of_mean = of_logvar = of_dz = of_dkl = None
    if dz is not None:
        zeros = torch.zeros(mean.shape, dtype=work, device=mean.device)
        eps, _ = from_pair(zeros, zeros, seed, example_ids, samples, first, True, backend=backend)
        scaled = torch.exp(logvar * 0.5) * eps
        of_dz = (g_mean + half * scaled).to(dtype)
        of_logvar = 0.5 * half * (dz.to(work) * scaled).sum(0)
    if dkl is not None:
        weight = _columns(dkl)
        of_mean = (g_mean * weight).to(dtype)
        of_dkl = g_mean * mean + half * torch.expm1(logvar)
        of_dkl = of_dkl if dkl.ndim == 2 else of_dkl.sum(1)
        of_var = half * weight * torch.exp(logvar)
        of_logvar = of_var if of_logvar is None else of_logvar + of_var
    return of_mean, None if of_logvar is None else of_logvar.to(dtype), of_dz, of_dkl


from_pair.register_autograd(_differentiate(_from_pair_backward), _save)
from_moments.register_autograd(_differentiate(_from_moments_backward), _save)
_from_pair_backward.register_autograd(_differentiate_pair_twice, _save_backward)
_from_moments_backward.register_autograd(_differentiate_moments_twice, _save_backward)
