"""The registered operations behind `reparameterize_kl`: backends, separate tensors and moments, gradients.

Rows: mean and logvar are [N, O, I], strided views of an example's D = O I columns (O = 1 for separate tensors); a
parameter of the prior is [N, D], [1, D] where all examples share it, or None; z is [S, N, D]; kl is [N], or [N, D]
elementwise. `_reparameterize_kl_reference` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks, _reparameterize_kl_reference, _reparameterize_kl_vmap, _rust, _triton
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops._reparameterize_kl_reference import second_order, work

# --- Triton --------------------------------------------------------------------------------------------------------


def _unit_stride(rows: Tensor) -> Tensor:
    """Rows whose columns lie side by side; a copy where they do not."""
    return rows if rows.shape[2] <= 1 or rows.stride(2) == 1 else rows.contiguous()


def _rows(parameter: Tensor | None) -> Tensor | None:
    """A parameter of the prior whose columns lie side by side, and whose rows, if several, do not share memory."""
    if parameter is None or parameter.numel() == 0:
        return parameter
    rows, columns = parameter.shape
    if (columns == 1 or parameter.stride(1) == 1) and (rows == 1 or parameter.stride(0) != 0):
        return parameter
    return parameter.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _triton_forward(mean: Tensor, logvar: Tensor, *rest: Any) -> Any:
    prior_mean, prior_logvar, seed, example_ids, *numbers = rest
    return _triton.kernels("reparameterize_kl").forward(
        _unit_stride(mean),
        _unit_stride(logvar),
        _rows(prior_mean),
        _rows(prior_logvar),
        seed,
        _contiguous(example_ids),
        *numbers,
    )


def _triton_backward(mean: Tensor, logvar: Tensor, *rest: Any) -> None:
    prior_mean, prior_logvar, dz, dkl, seed, example_ids, *numbers = rest
    _triton.kernels("reparameterize_kl").backward(
        _unit_stride(mean),
        _unit_stride(logvar),
        _rows(prior_mean),
        _rows(prior_logvar),
        _contiguous(dz),
        _contiguous(dkl),
        seed,
        _contiguous(example_ids),
        *numbers,
    )


# --- Rust ----------------------------------------------------------------------------------------------------------


def _strided(rows: Tensor) -> tuple[tuple[int, int], int, int]:
    """Span of all memory from the first to the last element, and the strides of examples and segments."""
    examples, segments, inner = rows.shape
    across, along = rows.stride()[:2]
    extent = (examples - 1) * across + (segments - 1) * along + inner if rows.numel() else 0
    return (rows.data_ptr(), extent), across, along


def _span(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else _rust.span(tensor)


def _given(parameter: Tensor | None, mean: Tensor) -> tuple[tuple[int, int], int, bool] | None:
    """Span of all memory, stride of examples (0 for one row that all share), whether it is wider than mean."""
    if parameter is None:
        return None
    rows, columns = parameter.shape
    stride = 0 if rows == 1 else parameter.stride(0)
    extent = (rows - 1) * stride + columns if parameter.numel() else 0
    return (parameter.data_ptr(), extent), stride, parameter.dtype != mean.dtype


def _wanted(gradient: Tensor | None, mean: Tensor) -> tuple[tuple[int, int], bool] | None:
    return None if gradient is None else (_rust.span(gradient), gradient.dtype != mean.dtype)


def _rust_forward(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    example_ids: Tensor | None,
    samples: int,
    first: int,
    elementwise: bool,
) -> tuple[Tensor, Tensor]:
    mean, logvar, example_ids = _unit_stride(mean), _unit_stride(logvar), _contiguous(example_ids)
    prior_mean, prior_logvar = _rows(prior_mean), _rows(prior_logvar)
    examples, columns = mean.shape[0], mean.shape[1] * mean.shape[2]
    z = torch.empty((samples, examples, columns), dtype=mean.dtype, device=mean.device)
    kl = torch.empty((examples, columns) if elementwise else examples, dtype=work(mean.dtype), device=mean.device)
    _rust.core.reparameterize_kl(
        str(mean.dtype).removeprefix("torch."),
        list(mean.shape),
        _strided(mean),
        _strided(logvar),
        [_given(prior_mean, mean), _given(prior_logvar, mean)],
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
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    seed: Tensor,
    example_ids: Tensor | None,
    samples: int,
    first: int,
    dmean: Tensor,
    dlogvar: Tensor,
    dprior_mean: Tensor | None,
    dprior_logvar: Tensor | None,
) -> None:
    together = not dmean.is_contiguous()  # the halves of moments, whose memory begins where dmean does
    mean, logvar, example_ids = _unit_stride(mean), _unit_stride(logvar), _contiguous(example_ids)
    prior_mean, prior_logvar = _rows(prior_mean), _rows(prior_logvar)
    dz, dkl = _contiguous(dz), _contiguous(dkl)
    _rust.core.reparameterize_kl_backward(
        str(mean.dtype).removeprefix("torch."),
        list(mean.shape),
        _strided(mean),
        _strided(logvar),
        [_given(prior_mean, mean), _given(prior_logvar, mean)],
        (int(seed), _span(example_ids), samples, first),
        _span(dz),
        _span(dkl),
        dkl is not None and dkl.ndim == 2,
        (dmean.data_ptr(), dmean.numel() * (2 if together else 1)),
        None if together else _rust.span(dlogvar),
        [_wanted(dprior_mean, mean), _wanted(dprior_logvar, mean)],
        _rust.threads(),
    )


# --- separate tensors and moments ----------------------------------------------------------------------------------


def _pair(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on mean and logvar [N, D]."""
    return lambda mean, logvar, *rest: run(mean.unsqueeze(1), logvar.unsqueeze(1), *rest)


def _pair_backward(run: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    def backward(mean: Tensor, logvar: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *inputs, prior_gradients = rest
        dmean, dlogvar = (torch.empty(mean.shape, dtype=mean.dtype, device=mean.device) for _ in range(2))
        of_prior, results = _room(mean, inputs[:2], prior_gradients)
        rows = (tensor.unsqueeze(1) for tensor in (mean, logvar))
        run(*rows, *inputs, dmean.unsqueeze(1), dlogvar.unsqueeze(1), *of_prior)
        return dmean, dlogvar, *results

    return backward


def _moments(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on moments [N, O, 2, I]."""
    return lambda moments, *rest: run(*moments.unbind(2), *rest)


def _moments_backward(run: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    def backward(moments: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *inputs, prior_gradients = rest
        dmoments = torch.empty(moments.shape, dtype=moments.dtype, device=moments.device)
        of_prior, results = _room(moments, inputs[:2], prior_gradients)
        run(*moments.unbind(2), *inputs, *dmoments.unbind(2), *of_prior)
        return dmoments, *results

    return backward


def _room(like: Tensor, prior: list[Tensor | None], wanted: bool) -> tuple[list[Tensor | None], list[Tensor]]:
    """Where the prior's gradients go, and what is returned: nothing of nothing is an empty tensor."""
    room = [None if p is None or not wanted else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in prior]
    return room, [like.new_empty(0) if r is None else r for r in room]


def _fake(mean: Tensor, logvar: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, samples, _, elementwise = rest
    examples, columns = mean.shape[0], mean.shape[1] * mean.shape[2]
    kl = mean.new_empty((examples, columns) if elementwise else (examples,), dtype=work(mean.dtype))
    return mean.new_empty((samples, examples, columns)), kl


def _fake_backward(*args: Any) -> None:
    """Nothing: the gradients are allocated, as ever."""


_FLOATS = frozenset(_checks.FLOATS)
_TRITON_FLOATS = _FLOATS - {torch.float64}
_DRAWS = "Tensor seed, Tensor? example_ids, int samples, int first"
_PRIOR = "Tensor? prior_mean, Tensor? prior_logvar"
_PAIR, _MOMENTS = f"Tensor mean, Tensor logvar, {_PRIOR}", f"Tensor moments, {_PRIOR}"
_GIVEN = f"Tensor? dz, Tensor? dkl, {_DRAWS}, bool prior_gradients"
_reference, _reference_backward = _reparameterize_kl_reference.forward, _reparameterize_kl_reference.backward

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
    f"({_PAIR}, {_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_pair_backward(_reference_backward),
    fake=_pair_backward(_fake_backward),
    rust=Kernel(_pair_backward(_rust_backward), _FLOATS),
    triton=Kernel(_pair_backward(_triton_backward), _TRITON_FLOATS),
)
_from_moments_backward = Operation(
    "reparameterize_kl_from_moments_backward",
    f"({_MOMENTS}, {_GIVEN}) -> (Tensor, Tensor, Tensor)",
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
        at = len(tensors) - 2
        wanted = any(ctx.needs_input_grad[at : at + 2])
        grads = operation(*tensors, dz, dkl, seed, example_ids, samples, first, wanted, backend=backend)
        of_prior = [g if wanted and p is not None else None for g, p in zip(grads[at:], tensors[at:], strict=True)]
        return *grads[:at], *of_prior, *[None] * 6

    return backward


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, seed, example_ids, samples, first, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seed, example_ids)
    ctx.rest = samples, first, backend


def _differentiate_pair_twice(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
    mean, logvar, *rest = ctx.saved_tensors
    return *_second_order(ctx, mean, logvar, rest, outer), *[None] * 6


def _differentiate_moments_twice(ctx: Any, outer: Tensor | None, *of_prior: Tensor | None) -> tuple[Tensor | None, ...]:
    moments, *rest = ctx.saved_tensors
    mean, logvar = (half.flatten(1) for half in moments.unbind(2))
    outers = (None, None) if outer is None else (half.flatten(1) for half in outer.unbind(2))
    *halves, dpm, dpv, ddz, ddkl = _second_order(ctx, mean, logvar, rest, (*outers, *of_prior))
    shape = moments.shape[0], moments.shape[1], moments.shape[3]
    of_moments = torch.stack([(torch.zeros_like(mean) if half is None else half).reshape(shape) for half in halves], 2)
    return of_moments, dpm, dpv, ddz, ddkl, *[None] * 6


def _second_order(
    ctx: Any, mean: Tensor, logvar: Tensor, rest: list[Tensor | None], outer: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    prior_mean, prior_logvar, dz, dkl, seed, example_ids = rest
    samples, first, backend = ctx.rest
    eps = None
    if dz is not None:  # z of mean 0 and std 1
        zeros = torch.zeros(mean.shape, dtype=work(mean.dtype), device=mean.device)
        eps, _ = from_pair(zeros, zeros, None, None, seed, example_ids, samples, first, True, backend=backend)
    of_mean, of_logvar, *given = outer
    of_prior_mean, of_prior_logvar = (
        None if prior is None or gradient is None or gradient.shape != prior.shape else gradient
        for prior, gradient in zip((prior_mean, prior_logvar), given, strict=True)
    )
    outers = of_mean, of_logvar, of_prior_mean, of_prior_logvar
    return second_order(mean, logvar, prior_mean, prior_logvar, dz, dkl, eps, outers)


from_pair.register_autograd(_differentiate(_from_pair_backward), _save)
from_moments.register_autograd(_differentiate(_from_moments_backward), _save)
_from_pair_backward.register_autograd(_differentiate_pair_twice, _save_backward)
_from_moments_backward.register_autograd(_differentiate_moments_twice, _save_backward)
_reparameterize_kl_vmap.register(from_pair, _from_pair_backward, 2)
_reparameterize_kl_vmap.register(from_moments, _from_moments_backward, 1)
