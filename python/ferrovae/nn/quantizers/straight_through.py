"""Gradients through a quantizer: what a code passes back to the vector it replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, normalize


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, with the gradient of the identity (van den Oord et al., 2017, arXiv:1711.00937)."""
    return x + (codes - x).detach()


def rotate_to(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, with the gradient of the rotation and scaling that takes each x to its code.

    The rotation trick (Fifty et al., 2024, arXiv:2410.06424, section 4.2): R = I - 2 w w^T + 2 v u^T with u, v the
    directions of x and its code and w that of u + v; R and the ratio of norms count as constants. The value equals the
    code up to rounding, except that x = 0 stays 0: it has no direction.

    x, codes: (..., D), floating point of one dtype; returns (..., D).
    """
    with torch.no_grad():
        x_norm = x.norm(dim=-1, keepdim=True)
        x_norm = torch.where(x_norm > 0, x_norm, 1.0)
        code_norm = codes.norm(dim=-1, keepdim=True)
        u = x / x_norm
        v = codes / torch.where(code_norm > 0, code_norm, 1.0)
        w = normalize(u + v, dim=-1, eps=1e-6)
        scale = code_norm / x_norm
    along_w = (x * w).sum(dim=-1, keepdim=True)
    along_u = (x * u).sum(dim=-1, keepdim=True)
    return scale * (x - 2 * along_w * w + 2 * along_u * v)


class _SoftAssignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
        # The codebook moves on before the backward pass. The codes are taken from the copy because torch.compile would
        # otherwise copy in the backward pass, too late.
        codebook = codebook.to(x.dtype, copy=True)
        ctx.save_for_backward(x, codebook)
        ctx.cosine = cosine
        return embedding(indices, codebook)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, codebook = ctx.saved_tensors
        chunk = max(1, 2**20 // codebook.shape[0])
        parts = [
            _soft_assignment_gradient(rows, row_grads, codebook, ctx.cosine)
            for rows, row_grads in zip(x.split(chunk), grad.split(chunk), strict=True)
        ]
        return torch.cat(parts), None, None, None


def _soft_assignment_gradient(x: Tensor, grad: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    distances = torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    logits = x @ codebook.T if cosine else -distances
    weights = logits.softmax(dim=-1)
    gains = grad @ codebook.T
    logit_grads = weights * (gains - (weights * gains).sum(dim=-1, keepdim=True))
    if cosine:
        return logit_grads @ codebook
    pulls = torch.where(distances > 0, logit_grads / distances, 0.0)
    return pulls @ codebook - pulls.sum(dim=-1, keepdim=True) * x


def soft_assignment(x: Tensor, indices: Tensor, codebook: Tensor, *, cosine: bool) -> Tensor:
    """The codes of `indices`, with the gradient of the expected code, softmax(-distance) @ codebook.

    With `cosine` the softmax is over inner products. The weights are recomputed in the backward pass for a few rows at
    a time, so the N x K matrix is never held.

    x: (N, D); indices: (N,) int64; codebook: (K, D), which gets no gradient; returns (N, D).
    """
    return _SoftAssignment.apply(x, indices, codebook, cosine)
