"""Gradients through a quantizer: what a code passes back to the vector it replaced."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm
from torch.nn.functional import normalize

_BLOCK = 1 << 17  # numbers that are worked on together


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, with the gradient of the identity (van den Oord et al., 2017, arXiv:1711.00937)."""
    return x + (codes - x).detach()


def rotate_to(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, with the gradient of the rotation and scaling that takes each x to its code.

    The rotation trick (Fifty et al., 2024, arXiv:2410.06424, section 4.2): R = I - 2 w w^T + 2 v u^T with u, v the
    directions of x and its code and w that of u + v; R and the ratio of norms count as constants. A zero x has no
    direction and stays 0. The codes get no gradient.

    x, codes: (..., D), floating point of one dtype; returns (..., D).
    """
    return _RotateTo.apply(x, codes)


class _RotateTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes)
        return torch.where(vector_norm(x, dim=-1, keepdim=True) == 0, 0.0, codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, codes = ctx.saved_tensors
        if torch.compiler.is_compiling() or x.numel() <= _BLOCK:
            return _rotated_back(x, codes, grad), None
        # Block by block, so that what lies between stays in the cache and takes no memory worth mentioning.
        dim = x.shape[-1]
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat = [tensor.reshape(-1, dim).split(max(1, _BLOCK // dim)) for tensor in (x, codes, grad, result)]
        for x_block, code_block, grad_block, out in zip(*flat, strict=True):
            out.copy_(_rotated_back(x_block, code_block, grad_block))
        return result, None


def _rotated_back(x: Tensor, codes: Tensor, grad: Tensor) -> Tensor:
    """R^T grad, scaled: (..., D)."""
    from_norm, to_norm = vector_norm(x, dim=-1, keepdim=True), vector_norm(codes, dim=-1, keepdim=True)
    per_x, per_code = (torch.where(norm > 0, norm, 1.0).reciprocal_() for norm in (from_norm, to_norm))
    both = (x * per_x).addcmul_(codes, per_code)
    length = vecdot(both, both)[..., None].clamp_(min=1e-12)
    along_both = vecdot(grad, both)[..., None] / length
    along_code = vecdot(grad, codes)[..., None] * per_code
    scale = to_norm * per_x
    turned = (grad * scale).addcmul_(both, along_both * scale, value=-2)
    return turned.addcmul_(x, along_code * per_x * scale, value=2)


def directional_reparam(x: Tensor, codes: Tensor, variance: float) -> Tensor:
    """x + |code - x| d, d the direction of code - x + noise: a step as long as to the code, in about its direction.

    DiVeQ (Vali et al., 2025, arXiv:2509.26469): d counts as a constant, so x and the code get gradients through the
    length. noise: normal, of the given variance.

    x, codes: (..., D); returns (..., D).
    """
    to_code = codes - x
    noised = (to_code + math.sqrt(variance) * torch.randn_like(to_code)).detach()
    return x + normalize(noised, dim=-1, eps=1e-6) * vector_norm(to_code, dim=-1, keepdim=True)


def soft_gradient(x: Tensor, codes: Tensor, temperature: float | Tensor, *, cosine: bool) -> Tensor:
    """Zeros with the gradient of sum_k p_k e_k through p = softmax(-distance / temperature).

    Added to the code of each x, they make it the straight-through version of a soft assignment. With `cosine` the
    softmax is over inner products. The weights are computed in the backward pass for a few rows at a time, so the N x K
    matrix is never held.

    x: (H, N, D); codes: (H, K, D), which must not change before the backward pass; returns (H, N, D).
    """
    return _SoftGradient.apply(x, codes, temperature, cosine)


class _SoftGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, temperature: float | Tensor, cosine: bool) -> Tensor:
        ctx.save_for_backward(x, codes)
        ctx.temperature, ctx.cosine = temperature, cosine
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, codes = ctx.saved_tensors
        of_x, of_codes = [], []
        for head in range(x.shape[0]):
            book, chunk = codes[head].to(x.dtype), max(1, 2**20 // codes.shape[1])
            total = torch.zeros_like(book)
            parts = [x.new_zeros(0, x.shape[-1])]
            for rows, row_grads in zip(x[head].split(chunk), grad[head].split(chunk), strict=True):
                of_rows, of_book = _soft_gradients(rows, row_grads, book, ctx.temperature, ctx.cosine)
                parts.append(of_rows)
                total = total + of_book
            of_x.append(torch.cat(parts))
            of_codes.append(total.to(codes.dtype))
        return torch.stack(of_x), torch.stack(of_codes), None, None


def _soft_gradients(
    x: Tensor, grad: Tensor, codes: Tensor, temperature: float | Tensor, cosine: bool
) -> tuple[Tensor, Tensor]:
    distances = torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist")
    logits = x @ codes.T if cosine else -distances
    weights = (logits / temperature).softmax(dim=-1)
    gains = grad @ codes.T
    logit_grads = weights * (gains - (weights * gains).sum(dim=-1, keepdim=True)) / temperature
    if cosine:
        return logit_grads @ codes, logit_grads.T @ x
    pulls = torch.where(distances > 0, logit_grads / distances, 0.0)
    of_x = pulls @ codes - pulls.sum(dim=-1, keepdim=True) * x
    return of_x, pulls.T @ x - pulls.sum(dim=0)[:, None] * codes
