"""The definition of `reparameterize_kl` in float64, and the gradients that are compared with it."""

from __future__ import annotations

import torch
from torch import Tensor

from ferrovae.ops import _philox

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def noise(seed: int, ids: Tensor, samples: int, columns: int, first: int = 0) -> Tensor:
    """eps [S, N, D] in float64."""
    return _philox.normals(torch.tensor([seed]), ids, torch.arange(first, first + samples), columns).double()


def truth(mean: Tensor, logvar: Tensor, eps: Tensor, batch_dims: int = 1) -> tuple[Tensor, Tensor]:
    """The definition, in float64; eps [S, ...] or [...]."""
    kl = 0.5 * (mean.square() + torch.expm1(logvar) - logvar)
    return mean + torch.exp(logvar / 2) * eps, kl.flatten(batch_dims).sum(-1) if kl.ndim > batch_dims else kl


def graded(function, *inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients of a fixed linear form of them."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    weights = [(torch.arange(out.numel()) % 7 - 2.0).reshape(out.shape) for out in outputs]  # exact in every dtype
    loss = sum((out.double() * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return [out.detach() for out in outputs] + list(torch.autograd.grad(loss, leaves))
