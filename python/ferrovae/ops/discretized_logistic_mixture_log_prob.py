"""`discretized_logistic_mixture_log_prob`: the log-likelihood of RGB images under mixtures of discretised logistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ferrovae.ops import _checks, _log_prob, _logistic, _transforms, _triton
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops._rust import core, plain, span, threads

_NAME = "discretized_logistic_mixture_log_prob"
_FLOOR = -7.0


def discretized_logistic_mixture_log_prob(
    x: Tensor,
    mixture_logits: Tensor,
    means: Tensor,
    log_scales: Tensor,
    coefficients: Tensor,
    *,
    levels: int = 256,
    log_scale_floor: float = _FLOOR,
    compat: str | None = None,
    batch_dims: int = 1,
) -> Tensor:
    """log p(x) = sum over pixels of log sum_m w_m p(r | m) p(g | m, r) p(b | m, r, g), in nats per example.

    w = softmax(mixture_logits); each p is a logistic's mass on the level of x, as in `discretized_logistic_log_prob`.
    With c = tanh(coefficients), green's mean is means_1 + c_0 r and blue's means_2 + c_1 r + c_2 g (Salimans et al.
    2017, PixelCNN++).

    Args:
        x: `(N, 3, H, W)` data, 2 v / (levels - 1) - 1 for v = 0 .. levels - 1; other values count as the nearest level.
            Any number of pixel dimensions. Leading batch dimensions may be missing or 1, as with `batch_dims=2`, where
            logits `(S, N, M, H, W)` meet x `(N, 3, H, W)`. It gets no gradient.
        mixture_logits: `(N, M, H, W)` for M components, floating point, on the device of x; -inf is no weight.
        means, log_scales, coefficients: `(N, 3, M, H, W)`, of the dtype of mixture_logits.
        levels: 2 to 65536.
        log_scale_floor: logarithms of scales below it count as it, and get no gradient there. -7 is PixelCNN++'s;
            `-math.inf` for none.
        compat: `"pixelcnn++"` evaluates the published code's approximation instead, to compare with its numbers: the
            log of a difference of distribution functions where that exceeds 1e-5, else the density in the middle. In
            float32 it is up to 2 nats per channel from the truth, and slower: plain torch, 256 levels.
        batch_dims: how many leading dimensions to keep.

    Returns:
        The first `batch_dims` dimensions, float32 (float64 for float64 parameters); 0 for images of no pixels, NaN for
        an example that holds a NaN. Sums over pixels accumulate in float64 on a CPU. Differentiable, also twice, in
        all but x.

    Raises:
        TypeError: an argument is no tensor or not floating point, or dtypes differ.
        ValueError: shapes that do not match, no component, devices that differ, `levels`, `batch_dims`, or `compat`
            out of range.
    """
    given = {"means": means, "log_scales": log_scales, "coefficients": coefficients}
    for label, value in ({"x": x, "mixture_logits": mixture_logits} | given).items():
        _checks.floating(_NAME, label, value)
    _checks.same_device(_NAME, "x", x, "mixture_logits", mixture_logits)
    _logistic.levels(_NAME, levels)
    if mixture_logits.ndim < 1:
        raise ValueError(f"{_NAME}: mixture_logits is (), expected (..., M, ...)")
    _log_prob.check_batch_dims(_NAME, batch_dims, mixture_logits.ndim - 1, "mixture_logits", mixture_logits)
    batch, (components, *pixels) = mixture_logits.shape[:batch_dims], mixture_logits.shape[batch_dims:]
    for label, value in given.items():
        _checks.alike(_NAME, label, value, "mixture_logits", mixture_logits)
        if value.shape != (*batch, 3, components, *pixels):
            raise ValueError(
                f"{_NAME}: {label} is {_checks.shape(value)}, expected {(*batch, 3, components, *pixels)} to match "
                f"mixture_logits {_checks.shape(mixture_logits)}"
            )
    if components == 0:
        raise ValueError(f"{_NAME}: mixture_logits is {_checks.shape(mixture_logits)}, expected at least one component")
    x = _log_prob.meeting(_NAME, x, torch.Size((*batch, 3, *pixels)), batch_dims, "mixture_logits")
    parameters = mixture_logits, means, log_scales, coefficients
    if compat is None:
        return _forward(*parameters, x, levels, float(log_scale_floor), batch_dims)
    _checks.choice(_NAME, "compat", compat, ("pixelcnn++",))
    if levels != 256:
        raise ValueError(f"{_NAME}: levels is {levels}, expected 256 with compat='pixelcnn++'")
    return _published(*parameters, x, float(log_scale_floor), batch_dims)


def _before(x: Tensor, c: Tensor, dim: int) -> Tensor:
    """What the means of red, green and blue grow by: x with the channels at `dim`, c with components after them."""
    red, green = x.select(dim, 0).unsqueeze(dim), x.select(dim, 1).unsqueeze(dim)
    of_green = c.select(dim, 0) * red
    of_blue = c.select(dim, 1) * red + c.select(dim, 2) * green
    return torch.stack((torch.zeros_like(of_green), of_green, of_blue), dim)


def _published(
    logits: Tensor, means: Tensor, log_scales: Tensor, coefficients: Tensor, x: Tensor, floor: float, batch_dims: int
) -> Tensor:
    work, dim = _log_prob.work_dtype(logits), batch_dims
    x = x.to(work).expand(logits.shape[:dim] + x.shape[x.ndim - (logits.ndim - dim) :])
    log_scale = log_scales.to(work).clamp_min(floor)
    means = means.to(work) + _before(x, coefficients.to(work).tanh(), dim)
    x, rate = x.unsqueeze(dim + 1), (-log_scale).exp()
    middle = rate * (x - means)
    above, below = middle + rate / 255, middle - rate / 255
    mass = above.sigmoid() - below.sigmoid()
    density = middle - log_scale - 2 * functional.softplus(middle) - torch.tensor(127.5).log().item()
    inside = torch.where(mass > 1e-5, mass.clamp_min(1e-12).log(), density)
    at_edge = torch.where(x < -0.999, functional.logsigmoid(above), -functional.softplus(below))
    each = torch.where((x < -0.999) | (x > 0.999), at_edge, inside).sum(dim)
    return _log_prob.sum_events((functional.log_softmax(logits.to(work), dim) + each).logsumexp(dim), batch_dims)


def _components(
    means: Tensor, log_scales: Tensor, coefficients: Tensor, x: Tensor, levels: int, floor: float, dim: int
) -> tuple[tuple[Tensor, Tensor, Tensor, int], Tensor, Tensor]:
    """What `_logistic` takes, tanh of the coefficients, and n / T: (..., 3, M, ...)."""
    work, top = _log_prob.work_dtype(means), levels - 1
    level = _logistic.level(x.to(work), top)
    level = level.expand(means.shape[: dim + 1] + means.shape[dim + 2 :])
    n, c = 2 * level - top, coefficients.to(work).tanh()
    level = level.unsqueeze(dim + 1).expand(means.shape)
    distance = _logistic.from_mean(level, means, top) - _before(n, c, dim)
    return (level, distance, log_scales.to(work).clamp_min(floor), top), c, n / top


def _reference(
    logits: Tensor,
    means: Tensor,
    log_scales: Tensor,
    coefficients: Tensor,
    x: Tensor,
    levels: int,
    floor: float,
    batch_dims: int,
) -> Tensor:
    logistic, _, _ = _components(means, log_scales, coefficients, x, levels, floor, batch_dims)
    logits = logits.to(_log_prob.work_dtype(logits))
    scores = logits + _logistic.log_mass(*logistic).sum(batch_dims)
    return _log_prob.sum_events(scores.logsumexp(batch_dims) - logits.logsumexp(batch_dims), batch_dims)


def _reference_backward(
    logits: Tensor,
    means: Tensor,
    log_scales: Tensor,
    coefficients: Tensor,
    x: Tensor,
    grad: Tensor,
    levels: int,
    floor: float,
    batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dim, dtype, work = batch_dims, logits.dtype, _log_prob.work_dtype(logits)
    logistic, c, values = _components(means, log_scales, coefficients, x, levels, floor, dim)
    logit, grad = logits.to(work), _log_prob.as_columns(grad, logits)
    scores = logit + _logistic.log_mass(*logistic).sum(dim)
    # softmax of scores that are all -inf is NaN: none has a share then
    share = (scores - scores.logsumexp(dim, keepdim=True).clamp_min(torch.finfo(work).min)).exp()
    d_logits = grad * (share - logit.softmax(dim))
    d_means, d_log_scales = _logistic.slopes(*logistic)
    weight = (grad * share).unsqueeze(dim)
    # A component without a share has no gradient, also where its own derivatives are infinite.
    d_means = torch.where(share.unsqueeze(dim) == 0, 0.0, weight * d_means)
    kept = (share.unsqueeze(dim) != 0) & ~(log_scales < floor)
    d_log_scales = torch.where(kept, weight * d_log_scales, 0.0)
    red, green = values.select(dim, 0).unsqueeze(dim), values.select(dim, 1).unsqueeze(dim)
    of_green, of_blue = d_means.select(dim, 1), d_means.select(dim, 2)
    d_coefficients = torch.stack((of_green * red, of_blue * red, of_blue * green), dim) * (1 - c.square())
    results = d_logits, d_means, d_log_scales, d_coefficients
    d_logits, d_means, d_log_scales, d_coefficients = (result.to(dtype).contiguous() for result in results)
    return d_logits, d_means, d_log_scales, d_coefficients


def _rust_arguments(
    parameters: tuple[Tensor, ...], x: Tensor, levels: int, batch_dims: int
) -> tuple[list[Tensor], str, tuple[int, int, int, int]]:
    """x and parameters in float32 or float64, contiguous; that dtype's name; images, components, pixels, levels."""
    logits, work = parameters[0], _log_prob.work_dtype(parameters[0])
    tensors = [plain(value, work) for value in (_log_prob.unexpanded(x), *parameters)]
    shape = logits.shape
    sizes = shape[:batch_dims].numel(), shape[batch_dims], shape[batch_dims + 1 :].numel(), levels
    return tensors, "float64" if work == torch.float64 else "float32", sizes


def _rust(
    logits: Tensor,
    means: Tensor,
    log_scales: Tensor,
    coefficients: Tensor,
    x: Tensor,
    levels: int,
    floor: float,
    batch_dims: int,
) -> Tensor:
    parameters = logits, means, log_scales, coefficients
    tensors, dtype, sizes = _rust_arguments(parameters, x, levels, batch_dims)
    out = torch.empty(tuple(logits.shape[:batch_dims]), dtype=tensors[0].dtype)
    spans = tuple(span(tensor) for tensor in tensors)
    core.discretized_logistic_mixture_log_prob(dtype, spans, sizes, floor, span(out), threads())  # type: ignore[arg-type]
    return out


def _rust_backward(
    logits: Tensor,
    means: Tensor,
    log_scales: Tensor,
    coefficients: Tensor,
    x: Tensor,
    grad: Tensor,
    levels: int,
    floor: float,
    batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = logits, means, log_scales, coefficients
    tensors, dtype, sizes = _rust_arguments(parameters, x, levels, batch_dims)
    out, grad = [torch.empty_like(tensor) for tensor in tensors[1:]], grad.contiguous()
    spans, room = tuple(span(tensor) for tensor in tensors), tuple(span(tensor) for tensor in out)
    core.discretized_logistic_mixture_log_prob_backward(
        dtype,
        spans,  # type: ignore[arg-type]
        sizes,
        floor,
        span(grad),
        room,  # type: ignore[arg-type]
        threads(),
    )
    d_logits, d_means, d_log_scales, d_coefficients = (value.to(logits.dtype) for value in out)
    return d_logits, d_means, d_log_scales, d_coefficients


def _triton_forward(
    logits: Tensor,
    means: Tensor,
    log_scales: Tensor,
    coefficients: Tensor,
    x: Tensor,
    levels: int,
    floor: float,
    batch_dims: int,
) -> Tensor:
    tensors = [value.contiguous() for value in (_log_prob.unexpanded(x), logits, means, log_scales, coefficients)]
    return _triton.kernels(_NAME).forward(*tensors, levels, floor, batch_dims)


def _triton_backward(
    logits: Tensor,
    means: Tensor,
    log_scales: Tensor,
    coefficients: Tensor,
    x: Tensor,
    grad: Tensor,
    levels: int,
    floor: float,
    batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = [value.contiguous() for value in (_log_prob.unexpanded(x), logits, means, log_scales, coefficients, grad)]
    return _triton.kernels(_NAME).backward(*tensors, levels, floor, batch_dims)


def _fake(logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape[: others[-1]], dtype=_log_prob.work_dtype(logits))


def _fake_backward(logits: Tensor, means: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like(means, memory_format=torch.contiguous_format)
    first = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return first, like, torch.empty_like(like), torch.empty_like(like)


_DTYPES = frozenset(_checks.FLOATS)
_TENSORS = "Tensor logits, Tensor means, Tensor log_scales, Tensor coefficients, Tensor x"
_NUMBERS = "int levels, float floor, int batch_dims"
_forward = Operation(
    _NAME,
    f"({_TENSORS}, {_NUMBERS}) -> Tensor",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust, _DTYPES),
    triton=Kernel(_triton_forward, _DTYPES - {torch.float64}),
)
_backward = Operation(
    f"{_NAME}_backward",
    f"({_TENSORS}, Tensor grad, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    rust=Kernel(_rust_backward, _DTYPES),
    triton=Kernel(_triton_backward, _DTYPES - {torch.float64}),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, levels, floor, batch_dims, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = levels, floor, batch_dims


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(*ctx.saved_tensors, grad, *ctx.numbers, backend=ctx.backend), *(None,) * 5)


def _differentiate_twice(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
    *parameters, x, grad = ctx.saved_tensors

    def slopes(logits: Tensor, means: Tensor, log_scales: Tensor, coefficients: Tensor, grad: Tensor) -> Any:
        return _reference_backward(logits, means, log_scales, coefficients, x, grad, *ctx.numbers)

    *found, d_grad = _transforms.differentiate_again(slopes, (*parameters, grad), outer)
    return (*found, None, d_grad, *(None,) * 4)


_forward.register_autograd(_differentiate, _save)
_backward.register_autograd(_differentiate_twice, _save)
_transforms.register_vmap(_forward, 4)
_transforms.register_vmap(_backward, 4)
