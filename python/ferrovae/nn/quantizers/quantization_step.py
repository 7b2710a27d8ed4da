"""One call of a vector quantizer: lookup, gradients and losses of its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ferrovae.nn.quantizers import losses
from ferrovae.nn.quantizers.code_statistics import finite_rows
from ferrovae.nn.quantizers.codebook import Codebook, take_codes
from ferrovae.nn.quantizers.in_place_optimizer import accumulate
from ferrovae.nn.quantizers.lookup import look_up, metric_of
from ferrovae.nn.quantizers.straight_through import directional_reparam, rotate_to, soft_gradient, straight_through
from ferrovae.nn.quantizers.token_codebooks import TokenCodebooks


class LossBreakdown(NamedTuple):
    """The terms of a quantizer's loss, each a scalar before its weight; a term that is off is 0.

    With `topk`, `commitment` is (B, N, k), of the N tokens of any layout.
    """

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class StepOptions(NamedTuple):
    """What a layer's calls have in common; see the arguments of `VectorQuantize`."""

    cosine: bool
    commitment_weight: float
    commitment_cross_entropy: bool
    orthogonal_weight: float
    orthogonal_active_only: bool
    orthogonal_most: int | None
    diversity_weight: float
    diversity_temperature: float
    stochastic: bool
    temperature: float
    soft: bool
    rotate: bool
    direct: bool
    direct_variance: float
    learnable: bool
    sync_update: float
    route: bool


class QuantizationStep:
    """The rows (H, N, D) of one call, float32 or float64, and what is found for them.

    H codebooks, N rows, K codes, D dimensions, k results of topk. `look_up` first; everything after it is of the codes
    that it saw, whatever becomes of the codebook meanwhile.
    """

    indices: Tensor  # (H, N), or (H, N, k)
    codes: Tensor  # (H, N, D), or (H, N, k, D), with the gradients of the codebook

    def __init__(
        self,
        book: Codebook,
        options: StepOptions,
        rows: Tensor,
        *,
        mask: Tensor | None,
        positions: int,
        shared_heads: int,
        topk: int | None,
        temperature: float | Tensor | None,
        freeze: bool,
        transform: Callable[[Tensor], Tensor] | None,
        training: bool,
        keeps_scores: bool,
    ) -> None:
        self.book, self.options, self.rows = book, options, rows
        self.exact = rows.detach().to(torch.float32)
        self.mask, self.positions, self.shared_heads = mask, positions, shared_heads
        self.topk, self.freeze, self.transform, self.training = topk, freeze, transform, training
        self.temperature = options.temperature if temperature is None else temperature
        self.in_place_loss = rows.new_zeros(())
        warm = isinstance(self.temperature, Tensor) or self.temperature > 0
        self.draws = options.stochastic and training and warm
        self.softens = options.soft and training and warm
        # What is differentiated through distances, or computed again in the backward pass, needs the codes as they are.
        self.keeps_codes = (
            keeps_scores
            or transform is not None
            or (training and (options.soft or options.diversity_weight > 0 or options.commitment_cross_entropy))
        )
        book.start(self.exact, self._valid)
        if training and not freeze:
            book.observe(self.exact, self._valid)

    def look_up(self) -> None:
        """Find the codes of the rows."""
        codes = self.book.codes()
        self._codes = codes.clone() if self.keeps_codes else codes
        temperature = self.temperature if self.draws else None
        self._own: TokenCodebooks | None = None
        if self.transform is not None:
            self._own = TokenCodebooks(self.transform, self._codes, self.options.cosine)
            self.indices, self.codes = self._own.look_up(self.exact, topk=self.topk, temperature=temperature)
        else:
            self.indices = look_up(
                self.exact, codes.detach(), cosine=self.options.cosine, topk=self.topk, temperature=temperature
            )
            # From the copy, or a compiled graph would only copy in the backward pass, too late.
            self.codes = take_codes(self._codes, self.indices)
        self.codes = self.codes.to(self.rows.dtype)

    def accumulate_in_place_gradients(self) -> None:
        """Add the gradients of the mean squared distance to the codes to those of the codebook."""
        if self._own is None and self.book.looks_up_embed:
            # In closed form, which needs no backward pass inside the forward one.
            with torch.no_grad():
                self.in_place_loss = losses.commitment(self.rows, self.codes, self.mask)
                gradient = losses.commitment_gradient(self.exact, self.book.embed, self.indices, self.mask)
            accumulate([self.book.embed], [gradient])
            return
        loss = losses.commitment(self.rows.detach(), self.codes, self.mask)
        learnt = [parameter for parameter in self.book.parameters() if parameter.requires_grad]
        accumulate(learnt, torch.autograd.grad(loss, learnt, allow_unused=True))
        self.in_place_loss = loss.detach()

    def vectors_with_gradient(self, input_requires_grad: bool) -> Tensor:
        """The codes, with the gradient to the rows that the options ask for."""
        options = self.options
        vectors = self.codes
        if not self.training:
            return vectors
        rows = self._rows_by_code()
        if input_requires_grad and options.route:
            if options.rotate:
                vectors = rotate_to(rows, vectors)
            elif options.direct:
                vectors = directional_reparam(rows, vectors, options.direct_variance)
            else:
                vectors = straight_through(rows, vectors)
        elif self.softens:
            soft = self._soft_gradient()
            vectors = vectors + (soft if self.topk is None else soft[:, :, None])
        if options.sync_update > 0:
            vectors = vectors + options.sync_update * (vectors - vectors.detach())
        return vectors

    def cross_entropy(self, targets: Tensor) -> Tensor:
        """The mean of -log softmax(-distance) at the given codes, (H, N) int64, but for -1 and masked rows."""
        if self.mask is not None:
            targets = torch.where(self.mask, targets, -1)
        if self._own is not None:
            return self._own.cross_entropy(self.rows, targets)
        return losses.cross_entropy(self.rows, self._codes, targets, metric_of(self.options.cosine))

    def loss(self) -> tuple[Tensor, LossBreakdown]:
        """The weighted sum of the terms, and these; a scalar, or (1, N, k) with topk."""
        options, zero = self.options, self.rows.new_zeros(())
        commitment = diversity = orthogonal = loss = zero
        if self.topk is not None and not self.training:
            commitment = losses.commitment_by_row(self._rows_by_code(), self.codes, self._mask_by_code())
            loss = commitment * options.commitment_weight if options.commitment_weight > 0 else commitment
        if self.training:
            if options.diversity_weight > 0:
                diversity = self._negative_diversity()
                loss = loss + options.diversity_weight * diversity
            if options.commitment_weight > 0:
                commitment = self._commitment()
                loss = loss + options.commitment_weight * commitment
            if options.orthogonal_weight > 0:
                orthogonal = self._orthogonality()
                loss = loss + options.orthogonal_weight * orthogonal
        return loss, LossBreakdown(commitment, diversity, orthogonal, self.in_place_loss)

    def _commitment(self) -> Tensor:
        learns = self.options.learnable and not self.freeze
        codes = self.codes if learns else self.codes.detach()
        if self.options.commitment_cross_entropy:
            return self.cross_entropy(self.indices)
        if self.topk is not None:
            return losses.commitment_by_row(self._rows_by_code(), codes, self._mask_by_code())
        return losses.commitment(self.rows, codes, self.mask)

    def _negative_diversity(self) -> Tensor:
        temperature = self.options.diversity_temperature
        if self._own is not None:
            return self._own.negative_diversity(self.rows, self.mask, self.positions, temperature)
        rows = losses.by_position(self.rows, self.positions, self.shared_heads)
        mask = None if self.mask is None else losses.by_position(self.mask, self.positions, self.shared_heads)
        return losses.negative_diversity(rows, self._codes, mask, temperature, metric_of(self.options.cosine))

    def _orthogonality(self) -> Tensor:
        """Of the codes after this step; a copy, because later steps write into them before the backward pass."""
        codes, most = self.book.embed.clone(), self.options.orthogonal_most
        heads, size = codes.shape[:2]
        if self.options.orthogonal_active_only:
            active = self._used_codes(heads, size)
            return losses.orthogonality(codes, active if most is None else losses.chosen_codes(active, most))
        if most is not None and most < size:
            codes = codes[:, torch.randperm(size, device=codes.device)[:most]]
        return losses.orthogonality(codes)

    def _used_codes(self, heads: int, size: int) -> Tensor:
        """Which codes visible rows were given: (H, K) bool."""
        indices = self.indices.flatten(1)
        mask = self._mask_by_code()
        visible = torch.ones_like(indices) if mask is None else mask.flatten(1).to(indices.dtype)
        counts = torch.zeros(heads, size, dtype=indices.dtype, device=indices.device)
        return counts.scatter_add(1, indices, visible) > 0

    def _soft_gradient(self) -> Tensor:
        if self._own is not None:
            return self._own.soft_gradient(self.rows, self.temperature)
        return soft_gradient(self.rows, self._codes, self.temperature, cosine=self.options.cosine)

    def _rows_by_code(self) -> Tensor:
        return self.rows if self.topk is None else self.rows[:, :, None].expand(self.codes.shape)

    def _mask_by_code(self) -> Tensor | None:
        if self.mask is None or self.topk is None:
            return self.mask
        return self.mask[:, :, None].expand(self.indices.shape)

    def _valid(self) -> Tensor:
        finite = finite_rows(self.exact)
        return finite if self.mask is None else finite & self.mask
