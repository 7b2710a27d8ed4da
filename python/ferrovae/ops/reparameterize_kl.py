"""`reparameterize_kl`: a draw from a diagonal normal posterior and its KL divergence to the prior, in one pass.

N examples, D dimensions of an example, S samples. The noise is a function of (seed, example id, sample, dimension)
only; it is drawn again in the backward pass instead of being kept.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ferrovae.ops import _checks
from ferrovae.ops._reparameterize_kl import from_moments, from_pair
from ferrovae.ops._reparameterize_kl_reference import work

Reduction = Literal["example", "element"]


def reparameterize_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    batch_dims: int = 1,
    num_samples: int | None = None,
    first_sample: int = 0,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    kl_reduction: Reduction = "example",
    seed: Tensor | int | None = None,
    example_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """z = mean + exp(logvar / 2) eps with eps ~ N(0, I), and KL(N(mean, exp(logvar)) || prior) in nats.

    Args:
        mean: `(N, ...)` float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        logvar: the log of the variance, shape, dtype and device of mean.
        batch_dims: how many leading dimensions count examples; the others are the D dimensions of an example.
        num_samples: draw S samples: z gets a new first dimension. Sample 0 is the draw of a call without it.
        first_sample: number of the first sample, so that samples drawn in parts have the bits of one draw.
        prior_mean, prior_logvar: a normal prior other than N(0, I), floating point, broadcast to mean; differentiable
            as well. One that the examples share, as `(D,)`, is never expanded over them.
        kl_reduction: `"example"` sums the KL over the dimensions of an example; `"element"` keeps them.
        seed: int64 `(1,)` (or an int): fixes eps on every device. Without it the seed is drawn from `generator`, or
            from torch's generator of the device, as `torch.manual_seed` sets it.
        example_ids: int64, shape of the batch dimensions: which stream of noise an example gets; its position in the
            batch by default.
        generator: for eager use.

    Returns:
        z, `(N, ...)` or `(S, N, ...)`, dtype of mean; kl, the batch dimensions (or mean's shape), float32 (float64 for
        float64). Differentiable, any number of times, in mean, logvar and the prior. Empty input gives empty z; an
        example without dimensions has kl 0.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype not named above; dtypes that differ.
        ValueError: shapes that do not match, two devices, an argument out of range, both seed and generator.
    """
    name = "reparameterize_kl"
    _checks.floating(name, "mean", mean)
    _checks.floating(name, "logvar", logvar)
    if mean.shape != logvar.shape:
        raise ValueError(
            f"{name}: logvar is {_checks.shape(logvar)}, expected {_checks.shape(mean)}, the shape of mean"
        )
    _checks.alike(name, "logvar", logvar, "mean", mean)
    draws = _draws(name, mean, batch_dims, num_samples, first_sample, seed, example_ids, generator)
    _check_kl(name, mean, prior_mean, prior_logvar, kl_reduction)
    rows = math.prod(mean.shape[:batch_dims]), math.prod(mean.shape[batch_dims:])
    prior = _rows(prior_mean, mean, batch_dims), _rows(prior_logvar, mean, batch_dims)
    elementwise = kl_reduction == "element"
    z, kl = from_pair(mean.reshape(rows), logvar.reshape(rows), *prior, *draws, elementwise)
    return _shaped(z, kl, mean.shape, batch_dims, num_samples, elementwise)


def reparameterize_kl_from_moments(
    moments: Tensor,
    *,
    dim: int = 1,
    batch_dims: int = 1,
    num_samples: int | None = None,
    first_sample: int = 0,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    kl_reduction: Reduction = "example",
    seed: Tensor | int | None = None,
    example_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`reparameterize_kl` of an encoder's output: mean is the first half of `moments` along `dim`, logvar the second.

    Args:
        moments: `(N, 2C, ...)` with dim=1; the size of `dim` is even. The halves are read where they are, and the
            gradient is written as one tensor: nothing is chunked, copied or concatenated.
        dim: the dimension that holds both; negative counts from the end.
        batch_dims, num_samples, first_sample, prior_mean, prior_logvar, kl_reduction, seed, example_ids, generator: as
            in `reparameterize_kl`, where mean is `(N, C, ...)`.

    Returns:
        z `(N, C, ...)` or `(S, N, C, ...)` and kl: what `reparameterize_kl(*moments.chunk(2, dim))` gives, bit for bit.

    Raises:
        TypeError, ValueError: as `reparameterize_kl`; `dim` out of range, or of odd size.
    """
    name = "reparameterize_kl_from_moments"
    _checks.floating(name, "moments", moments)
    if not -moments.ndim <= dim < moments.ndim:
        raise ValueError(f"{name}: dim is {dim}, expected a dimension of moments {_checks.shape(moments)}")
    dim %= moments.ndim
    if moments.shape[dim] % 2 != 0:
        raise ValueError(
            f"{name}: moments are {_checks.shape(moments)}, expected an even size (mean and logvar) in dim {dim}"
        )
    mean = moments.narrow(dim, 0, moments.shape[dim] // 2)
    draws = _draws(name, mean, batch_dims, num_samples, first_sample, seed, example_ids, generator)
    _check_kl(name, mean, prior_mean, prior_logvar, kl_reduction)
    prior = _rows(prior_mean, mean, batch_dims), _rows(prior_logvar, mean, batch_dims)
    elementwise = kl_reduction == "element"
    z, kl = from_moments(_halves(moments, dim, batch_dims), *prior, *draws, elementwise)
    return _shaped(z, kl, mean.shape, batch_dims, num_samples, elementwise)


def _halves(moments: Tensor, dim: int, batch_dims: int) -> Tensor:
    """Moments as [N, O, 2, I]: an example is O segments of I columns, each for mean and logvar. A view if it can be."""
    split = moments.unflatten(dim, (2, moments.shape[dim] // 2))
    if dim < batch_dims:
        split = split.movedim(dim, batch_dims)
        dim = batch_dims
    sizes = split.shape[:batch_dims], split.shape[batch_dims:dim], split.shape[dim + 1 :]
    examples, outer, inner = (math.prod(size) for size in sizes)
    return split.reshape(examples, outer, 2, inner)


def _draws(
    name: str,
    mean: Tensor,
    batch_dims: int,
    num_samples: int | None,
    first_sample: int,
    seed: Tensor | int | None,
    example_ids: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None, int, int]:
    """What decides the noise: seed [1], example ids [N], number of samples, first sample."""
    if not 0 <= batch_dims <= mean.ndim:
        raise ValueError(
            f"{name}: batch_dims is {batch_dims}, expected 0 to {mean.ndim} for mean {_checks.shape(mean)}"
        )
    samples = 1 if num_samples is None else num_samples
    if samples < 1:
        raise ValueError(f"{name}: num_samples is {num_samples}, expected at least 1")
    if first_sample < 0 or first_sample + samples > 2**32:
        raise ValueError(
            f"{name}: first_sample is {first_sample}, expected 0 to 2^32 - {samples} with {samples} samples"
        )
    if example_ids is not None:
        if _checks.tensor(name, "example_ids", example_ids).dtype != torch.int64:
            raise TypeError(f"{name}: example_ids are {example_ids.dtype}, expected int64")
        if example_ids.shape != mean.shape[:batch_dims]:
            raise ValueError(
                f"{name}: example_ids are {_checks.shape(example_ids)}, expected {tuple(mean.shape[:batch_dims])}, the "
                f"batch dimensions of mean {_checks.shape(mean)}"
            )
        _checks.same_device(name, "example_ids", example_ids, "mean", mean)
        example_ids = example_ids.detach().reshape(-1)
    return _checks.seed(name, seed, generator, mean.device), example_ids, samples, first_sample


def _check_kl(
    name: str, mean: Tensor, prior_mean: Tensor | None, prior_logvar: Tensor | None, kl_reduction: str
) -> None:
    _checks.choice(name, "kl_reduction", kl_reduction, ("example", "element"))
    for label, value in (("prior_mean", prior_mean), ("prior_logvar", prior_logvar)):
        if value is not None:
            _checks.floating(name, label, value)
            _checks.same_device(name, label, value, "mean", mean)
            _checks.broadcasts(name, label, value, "mean", mean)


def _rows(parameter: Tensor | None, mean: Tensor, batch_dims: int) -> Tensor | None:
    """A parameter of the prior as [N, D], or as [1, D] where all examples share it."""
    if parameter is None:
        return None
    if parameter.dtype != mean.dtype:
        parameter = parameter.to(work(mean.dtype))
    batch = max(0, batch_dims - (mean.ndim - parameter.ndim))
    if all(size == 1 for size in parameter.shape[:batch]):
        shape = mean.shape[batch_dims:]
        return parameter.reshape(parameter.shape[batch:]).expand(shape).reshape(1, math.prod(shape))
    return parameter.expand(mean.shape).reshape(math.prod(mean.shape[:batch_dims]), math.prod(mean.shape[batch_dims:]))


def _shaped(
    z: Tensor, kl: Tensor, shape: torch.Size, batch_dims: int, num_samples: int | None, elementwise: bool
) -> tuple[Any, Any]:
    """Rows back to the caller's shapes: z [S, N, D] and kl [N] or [N, D]."""
    leading = () if num_samples is None else (num_samples,)
    return z.reshape(*leading, *shape), kl.reshape(shape if elementwise else shape[:batch_dims])
