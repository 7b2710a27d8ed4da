"""The meaning of `reparameterize_kl` in plain torch: values, gradients, and the gradients of the gradients.

Rows: mean and logvar are [N, D], a parameter of the prior [N, D] or, shared by all examples, [1, D]; eps and z are
[S, N, D]; kl is [N], or [N, D] elementwise. With std = exp(logvar / 2), d = mean - prior_mean,
v = exp(-prior_logvar), r = logvar - prior_logvar:

    z = mean + std eps                       kl = 1/2 sum(d^2 v + expm1(r) - r)
    dmean = sum_s dz + dkl d v               dlogvar = 1/2 (std sum_s dz eps + dkl expm1(r))
    dprior_mean = -dkl d v                   dprior_logvar = -1/2 dkl (d^2 v + expm1(r))
"""

from __future__ import annotations

import torch
from torch import Tensor

from ferrovae.ops import _philox


def work(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def columns(per_example: Tensor) -> Tensor:
    """kl's gradient [N] or [N, D] as [N, 1] or [N, D]."""
    return per_example if per_example.ndim == 2 else per_example.unsqueeze(1)


def noise(like: Tensor, seed: Tensor, example_ids: Tensor | None, samples: int, first: int) -> Tensor:
    """eps [S, N, D] for like [N, D]."""
    if example_ids is None:
        example_ids = torch.arange(like.shape[0], device=like.device)
    numbers = torch.arange(first, first + samples, device=like.device)
    return _philox.normals(seed, example_ids, numbers, like.shape[1]).to(like.dtype)


def _against_prior(
    mean: Tensor, logvar: Tensor, prior_mean: Tensor | None, prior_logvar: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d, v and r."""
    difference, ratio, precision = mean, logvar, torch.ones_like(mean)
    if prior_mean is not None:
        difference = mean - prior_mean.to(mean.dtype)
    if prior_logvar is not None:
        prior_logvar = prior_logvar.to(mean.dtype)
        ratio, precision = logvar - prior_logvar, torch.exp(-prior_logvar)
    return difference, precision, ratio


def forward(
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
    """z and kl of mean and logvar [N, O, I], D = O I."""
    dtype, real = mean.dtype, work(mean.dtype)
    mean, logvar = mean.to(real).flatten(1), logvar.to(real).flatten(1)
    eps = noise(mean, seed, example_ids, samples, first)
    z = (mean + torch.exp(logvar * 0.5) * eps).to(dtype)
    difference, precision, ratio = _against_prior(mean, logvar, prior_mean, prior_logvar)
    # the root of the precision, so that neither factor overflows where the product does not
    terms = 0.5 * ((difference * precision.sqrt()).square() + (torch.expm1(ratio) - ratio))
    if elementwise:
        return z, terms
    return z, _sum(terms, 1).to(real)


def backward(
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
    """Write the gradients: dmean and dlogvar [N, O, I], and as long as the prior's parameters where those are given."""
    real = work(mean.dtype)
    shape = mean.shape
    mean, logvar = mean.to(real).flatten(1), logvar.to(real).flatten(1)
    of_mean, of_logvar = torch.zeros_like(mean), torch.zeros_like(mean)
    if dz is not None:
        dz = dz.to(real)
        of_mean += dz.sum(0)
        of_logvar += torch.exp(logvar * 0.5) * (dz * noise(mean, seed, example_ids, samples, first)).sum(0)
    pull = square = torch.zeros_like(mean)
    if dkl is not None:
        difference, precision, ratio = _against_prior(mean, logvar, prior_mean, prior_logvar)
        pull = columns(dkl) * difference * precision
        square = columns(dkl) * ((difference * precision.sqrt()).square() + torch.expm1(ratio))
        of_mean += pull
        of_logvar += columns(dkl) * torch.expm1(ratio)
    dmean.copy_(of_mean.view(shape))
    dlogvar.copy_((of_logvar * 0.5).view(shape))
    for target, gradient in ((dprior_mean, -pull), (dprior_logvar, -0.5 * square)):
        if target is not None:
            target.copy_(gradient if target.shape == gradient.shape else _sum(gradient, 0).unsqueeze(0))


def second_order(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    eps: Tensor | None,
    outer: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of <outer, backward> in mean, logvar, both of the prior, dz and dkl.

    In plain torch, so that they have gradients themselves. eps is None where dz is.
    """
    dtype, real = mean.dtype, work(mean.dtype)
    mean, logvar = mean.to(real), logvar.to(real)
    g_mean, g_logvar, g_prior_mean, g_prior_logvar = (
        torch.zeros_like(mean) if g is None else g.to(real) for g in outer
    )
    half = 0.5 * g_logvar
    of_mean = of_logvar = of_prior_mean = of_prior_logvar = of_dz = of_dkl = None
    if dz is not None and eps is not None:
        scaled = torch.exp(logvar * 0.5) * eps
        of_dz = (g_mean + half * scaled).to(dtype)
        of_logvar = 0.5 * half * (dz.to(real) * scaled).sum(0)
    if dkl is not None:
        weight = columns(dkl)
        difference, precision, ratio = _against_prior(mean, logvar, prior_mean, prior_logvar)
        pulled, spread = g_mean - g_prior_mean, half - 0.5 * g_prior_logvar
        square = difference.square() * precision
        of_mean = weight * precision * (pulled - g_prior_logvar * difference)
        of_var = weight * spread * torch.exp(ratio)
        of_logvar = of_var if of_logvar is None else of_logvar + of_var
        of_dkl = pulled * difference * precision + spread * torch.expm1(ratio) - 0.5 * g_prior_logvar * square
        of_dkl = of_dkl if dkl.ndim == 2 else of_dkl.sum(1)
        if prior_mean is not None:
            of_prior_mean = (-of_mean).sum_to_size(prior_mean.shape).to(prior_mean.dtype)
        if prior_logvar is not None:
            direct = weight * (0.5 * g_prior_logvar * square - pulled * difference * precision)
            of_prior_logvar = (direct - of_var).sum_to_size(prior_logvar.shape).to(prior_logvar.dtype)
        of_mean = of_mean.to(dtype)
    return of_mean, None if of_logvar is None else of_logvar.to(dtype), of_prior_mean, of_prior_logvar, of_dz, of_dkl


def _sum(terms: Tensor, dim: int) -> Tensor:
    """In float64 on a CPU, in the order and precision of torch elsewhere."""
    return terms.sum(dim, dtype=torch.float64 if terms.device.type == "cpu" else terms.dtype)
