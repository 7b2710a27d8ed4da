"""`reparameterize_kl` beside what people write in torch, eager and compiled; forward, and with the backward pass."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ferrovae import ops
from ferrovae.bench.case import Case, Work

# 2^22 elements, a VAE's latents, an image autoencoder's latents [N, C, H, W]
SHAPES: list[dict[str, int]] = [{"N": 4096, "D": 1024}, {"N": 128, "D": 50}, {"N": 16, "C": 4, "H": 64, "W": 64}]
VARIANTS = ("", "moments", "learned prior")

Outputs = tuple[Tensor, Tensor]


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Mean and logvar apart, in one tensor of moments, and with a learned prior of one row; forward and full."""
    size = tuple(shape.values())
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    moments = torch.cat([draw(size), 0.5 * draw(size)], 1).to(device)
    prior = [(0.5 * draw(size[1:])).to(device) for _ in range(2)]
    weights = draw(size).to(device), draw(size[:1]).to(device)
    for variant in VARIANTS:
        halves = moments.chunk(2, 1)
        inputs = [moments] if variant == "moments" else [half.contiguous() for half in halves]
        inputs += prior if variant == "learned prior" else []
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        functions: dict[str, Callable[..., Outputs]] = {"ferrovae": _ours(variant), "eager": _PEERS[variant]}
        if device.type != "cpu" or any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
            functions["torch.compile"] = torch.compile(_PEERS[variant], dynamic=False)
        for mode in ("forward", "full"):
            promised = mode == "full" and variant == "" and math.prod(size) == 2**22
            yield Case(
                operation="reparameterize_kl",
                shape=shape,
                providers={
                    name: partial(_forward, function, inputs)
                    if mode == "forward"
                    else partial(_full, function, leaves, weights)
                    for name, function in functions.items()
                },
                check=partial(_check, inputs, weights),
                mode=mode,
                variant=variant,
                work=Work(bytes=4 * (3 if mode == "forward" else 8) * math.prod(size)),
                targets={"eager": 3.0, "torch.compile": 1.2} if promised else {},
            )


def _ours(variant: str) -> Callable[..., Outputs]:
    if variant == "moments":
        return ops.reparameterize_kl_from_moments
    if variant == "learned prior":
        return lambda mean, logvar, prior_mean, prior_logvar: ops.reparameterize_kl(
            mean, logvar, prior_mean=prior_mean, prior_logvar=prior_logvar
        )
    return ops.reparameterize_kl


def _plain(mean: Tensor, logvar: Tensor) -> Outputs:
    """What people write."""
    std = torch.exp(0.5 * logvar)
    z = mean + std * torch.randn_like(std)
    return z, -0.5 * (1 + logvar - mean.square() - logvar.exp()).flatten(1).sum(1)


def _chunked(moments: Tensor) -> Outputs:
    mean, logvar = moments.chunk(2, 1)
    std = torch.exp(0.5 * logvar)
    z = mean + std * torch.randn_like(std)
    return z, -0.5 * (1 + logvar - mean.square() - logvar.exp()).flatten(1).sum(1)


def _with_prior(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Outputs:
    std = torch.exp(0.5 * logvar)
    z = mean + std * torch.randn_like(std)
    ratio = (logvar.exp() + (mean - prior_mean).square()) / prior_logvar.exp()
    return z, 0.5 * (prior_logvar - logvar + ratio - 1).flatten(1).sum(1)


_PEERS: dict[str, Callable[..., Outputs]] = {"": _plain, "moments": _chunked, "learned prior": _with_prior}


def _forward(function: Callable[..., Outputs], inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(function(*inputs))


def _full(function: Callable[..., Outputs], leaves: list[Tensor], weights: Outputs) -> list[Tensor]:
    z, kl = function(*leaves)
    return [z.detach(), kl.detach(), *torch.autograd.grad([z, kl], leaves, list(weights))]


def _check(inputs: list[Tensor], weights: Outputs, name: str, result: object) -> bool:
    """Values and gradients against float64 with the noise that z shows, which must be standard normal."""
    assert isinstance(result, list)
    z, kl, *gradients = (tensor.double() for tensor in result)
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    mean, logvar = leaves[0].chunk(2, 1) if len(leaves) == 1 else leaves[:2]
    prior_mean, prior_logvar = leaves[2:] or (torch.zeros_like(mean),) * 2
    ratio, difference = logvar - prior_logvar, mean - prior_mean
    terms = 0.5 * (difference.square() * torch.exp(-prior_logvar) + torch.expm1(ratio) - ratio)
    truth = terms.flatten(1).sum(1)
    eps = ((z - mean) * torch.exp(-0.5 * logvar)).detach()
    exact = torch.autograd.grad(
        [mean + torch.exp(0.5 * logvar) * eps, truth], leaves, [weight.double() for weight in weights]
    )
    right = [torch.allclose(kl, truth.detach(), rtol=1e-5, atol=1e-4)]
    for mine, due in zip(gradients, exact, strict=bool(gradients)):
        right.append(bool((mine - due).norm() <= 1e-5 * due.norm()))
    error = 6 / math.sqrt(eps.numel())  # six standard errors
    right.append(abs(float(eps.mean())) < error)
    right.append(abs(float(eps.square().mean()) - 1) < math.sqrt(2) * error)
    return all(right)
