"""All stages of a residual stack at once: one lookup, and one pass over the stages for losses and statistics.

N rows, Q stages, K codes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from ferrovae.nn.quantizers.codebook import Codebook
from ferrovae.nn.quantizers.stack_update import StageDropout, StageUpdate, shared_updates
from ferrovae.ops import residual_nearest_code


class StackResult(NamedTuple):
    """What the stages found."""

    quantized: Tensor  # (..., D)
    indices: Tensor  # (..., Q), -1 where a stage does not take a row
    losses: Tensor  # (Q,)
    updates: list[StageUpdate]


def codebooks_of(books: Sequence[Codebook]) -> Tensor | list[Tensor]:
    """What `residual_nearest_code` asks for; a shared codebook once."""
    embeds = [book.embed.detach()[0] for book in books]
    if all(book is books[0] for book in books):
        return embeds[0].expand(len(books), *embeds[0].shape)
    return torch.stack(embeds) if len({len(embed) for embed in embeds}) == 1 else embeds


@torch.no_grad()
def look_up_stages(books: Sequence[Codebook], x: Tensor, limits: Tensor | None) -> StackResult:
    """Rows (N, D), float32 or float64, through all stages, or int64 (N,) of them each; no losses."""
    indices, quantized = residual_nearest_code(x, codebooks_of(books), stages=limits)
    return StackResult(quantized, indices, x.new_zeros(len(books)), [])


def train_stages(
    books: Sequence[Codebook],
    x: Tensor,
    limits: Tensor | None,
    *,
    commitment_weight: float,
    rotate: bool,
    route: bool,
    freeze: bool,
    dropout: StageDropout,
) -> StackResult:
    """A training step of rows (N, D), float32 or float64, with straight-through or rotated gradients for each stage.

    The loss of a stage is the weighted mean squared distance of its residuals to their codes. With `rotate` a residual
    of 0 has no direction, and stays 0 through the stages after it.

    route: False gives the rows no gradient from the sums of codes.
    limits: int64 (N,), how many stages a row goes through; by default all.
    dropout: what quantizer dropout means for the codebooks.
    """
    passes = x.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        rows = x.detach()
        indices, quantized, codes = residual_nearest_code(rows, codebooks_of(books), stages=limits, return_stages=True)
        zeros_stay = rotate and route and x.requires_grad
        errors, zero, updates = _walk(books, rows, limits, indices, codes, None if freeze else dropout, zeros_stay)
        if zeros_stay:
            quantized = torch.where(zero[:, None], rows.to(quantized.dtype), quantized)
        if limits is None:
            counts = errors.new_full((len(books),), max(x.numel(), 1))
        else:
            reached = limits[:, None] > torch.arange(len(books), device=x.device)
            errors = torch.where(reached, errors, 0.0)
            counts = (reached.sum(dim=0) * x.shape[1]).clamp(min=1).to(errors.dtype)
        weights = commitment_weight / counts
        losses = errors.sum(dim=0) * weights
    if passes:
        vectors, losses = _StageGradients.apply(x, quantized, losses, codes, weights, limits, rotate)
        quantized = vectors if route else quantized
    return StackResult(quantized, indices, losses, updates)


def _walk(
    books: Sequence[Codebook],
    x: Tensor,
    limits: Tensor | None,
    indices: Tensor,
    codes: Tensor,
    dropout: StageDropout | None,
    zeros_stay: bool,
) -> tuple[Tensor, Tensor, list[StageUpdate]]:
    """Through the stages: squared distances (N, Q) of residuals to codes, and what each codebook learns.

    With `zeros_stay`, indices and codes are those of 0 from where a residual is 0, written in place; the second result
    says of which rows: bool (N,).
    """
    residual, squares = x, []
    seen: list[tuple[Tensor, Tensor | None]] = []
    updates: list[StageUpdate] = []
    shared = books[0].options.shared_by_stages
    zero = vecdot(x, x) == 0
    for stage, book in enumerate(books):
        reached = None if limits is None else limits > stage
        if zeros_stay and not _certainly_none(zero):
            _look_up_zeros(book, zero if reached is None else zero & reached, indices[:, stage], codes[:, stage])
        if dropout is not None and book.wants_statistics():
            exact = residual.to(torch.float32)[None]
            mask = None if reached is None else reached[None]
            statistics = book.local_statistics(exact, indices[None, :, stage], mask)
            updates.append(dropout.mark(StageUpdate(book, statistics), stage))
            if shared and book.replaces_dead_codes:
                seen.append((exact, mask))
        residual = residual - codes[:, stage]
        squares.append(vecdot(residual, residual))
        if zeros_stay:
            if not _certainly_none(zero):
                residual.masked_fill_(zero[:, None], 0.0)
            zero = zero | (squares[-1] == 0)
    if shared:
        updates = shared_updates(books[0], updates, seen)
    return torch.stack(squares, dim=1), zero, updates


def _certainly_none(rows: Tensor) -> bool:
    """Whether no row is marked, where the host can tell at no cost."""
    return rows.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(rows.any())


def _look_up_zeros(book: Codebook, zero: Tensor, indices: Tensor, codes: Tensor) -> None:
    """Write the code nearest to 0 to the rows that are."""
    embed = book.embed.detach()[0]
    nearest = vecdot(embed, embed).argmin(dim=0, keepdim=True)
    indices.copy_(torch.where(zero, nearest, indices))
    codes.copy_(torch.where(zero[:, None], embed.index_select(0, nearest).to(codes.dtype), codes))


class _StageGradients(torch.autograd.Function):
    """The gradient of sums of codes and losses to the rows: the residuals' codes count as constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        quantized: Tensor,
        losses: Tensor,
        codes: Tensor,
        weights: Tensor,
        limits: Tensor | None,
        rotate: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, codes, weights, limits)
        ctx.rotate = rotate
        return quantized.clone(), losses.clone()

    @staticmethod
    def backward(ctx: Any, of_quantized: Tensor, of_losses: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, weights, limits = ctx.saved_tensors
        pulls = 2 * of_losses * weights
        residual, scale = x, x.new_zeros(x.shape[0])
        grad = torch.zeros_like(x)
        for stage in range(codes.shape[1]):
            code = codes[:, stage]
            reached = None if limits is None else limits > stage
            pull = pulls[stage] if reached is None else pulls[stage] * reached
            if ctx.rotate:
                square = vecdot(residual, residual)
                gain, of_residual, of_code = _rotation(residual, code, of_quantized, square)
                scale = scale + gain
                grad.addcmul_(residual, (of_residual + pull)[:, None])
                grad.addcmul_(code, (of_code - pull)[:, None])
                zero = square == 0
                residual = residual - code
                if not _certainly_none(zero):
                    residual.masked_fill_(zero[:, None], 0.0)
            else:
                scale = scale + (1.0 if reached is None else reached.to(scale.dtype))
                residual_pull = pull if reached is None else pull[:, None]
                error = residual - code
                grad.addcmul_(error, residual_pull)
                residual = error
        return grad.addcmul_(of_quantized, scale[:, None]), None, None, None, None, None, None


def _rotation(x: Tensor, code: Tensor, grad: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers s, a, b of each row with which s grad + a x + b code is `rotate_to`'s gradient to x; square: |x|^2.

    With directions u of x, v of the code, and w = u + v: s = |code| / |x|, and the gradient is
    s (grad - 2 (grad . w) / (w . w) w + 2 (grad . v) u).
    """
    x_norm, code_norm = square.sqrt(), vecdot(code, code).sqrt()
    per_x, per_code = (torch.where(norm > 0, norm, 1.0).reciprocal() for norm in (x_norm, code_norm))
    along_x, along_code = vecdot(grad, x) * per_x, vecdot(grad, code) * per_code
    scale = code_norm * per_x
    lengths = (x_norm * per_x).square() + (code_norm * per_code).square()
    both = (lengths + 2 * vecdot(x, code) * per_x * per_code).clamp(min=1e-12)
    reflected = -2 * scale * (along_x + along_code) / both
    return scale, (reflected + 2 * scale * along_code) * per_x, reflected * per_code
