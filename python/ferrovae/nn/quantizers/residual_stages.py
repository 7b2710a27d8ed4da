"""The stages of a residual stack one by one: for options that need a stage's result before the next can begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ferrovae.nn.quantizers.implicit_codebook import ImplicitCodebook
from ferrovae.nn.quantizers.residual_lookup import StackResult
from ferrovae.nn.quantizers.stack_update import ResidualStage, StageDropout, StageUpdate, shared_updates
from ferrovae.nn.quantizers.token_codebooks import ConditionedTransform


class StageCall(NamedTuple):
    """What all stages of one call have in common."""

    mask: Tensor | None  # bool (B, ...): tokens that are no padding
    dropout: StageDropout
    temperature: float | Tensor | None
    freeze: bool
    quant_grad_frac: float

    def visible(self, stage: int, grid: torch.Size) -> Tensor | None:
        """The tokens that a stage takes: bool (B, ...), or None for all."""
        kept = self.dropout.mask(stage, grid)
        if kept is None or self.mask is None:
            return self.mask if kept is None else kept
        return kept & self.mask

    def left_over(self, residual: Tensor, quantized: Tensor) -> Tensor:
        """The next stage's input, with `quant_grad_frac` of the gradient to this stage's codes."""
        frac, fixed = self.quant_grad_frac, quantized.detach()
        return residual - (fixed if frac <= 0 else frac * quantized + (1 - frac) * fixed)


def each_stage(
    stages: Sequence[ResidualStage],
    networks: Sequence[ImplicitCodebook | None],
    x: Tensor,
    call: StageCall,
    targets: Tensor | None = None,
) -> StackResult:
    """Quantize x (B, ..., D) by one stage after the other.

    networks: for each stage what makes its codes from the sum of those before, or None.
    targets: int64 (B, ..., Q): the losses are the cross-entropies of the stages at these codes.
    """
    residual, quantized = x, torch.zeros_like(x)
    found, losses = [], []
    updates: list[StageUpdate] = []
    seen: list[tuple[Tensor, Tensor | None]] = []
    for number, (stage, network) in enumerate(zip(stages, networks, strict=True)):
        visible = call.visible(number, x.shape[:-1])
        transform = None if network is None else ConditionedTransform(network, quantized)
        own: list[StageUpdate] = []
        stage.updates = own
        try:
            result = stage(
                residual,
                indices=None if targets is None else targets[..., number],
                mask=visible,
                sample_codebook_temp=call.temperature,
                freeze_codebook=call.freeze,
                codebook_transform_fn=transform,
            )
        finally:
            stage.updates = None
        vectors, loss = result[0], result[-1]
        if visible is not None:
            vectors = torch.where(visible[..., None], vectors, 0.0)
        if call.dropout.kept is not None:
            loss = loss * (call.dropout.kept > number).any()
        updates += [call.dropout.mark(update, number) for update in own]
        if own and stage._codebook.options.shared_by_stages:
            rows = stage._rows(residual.detach()).to(torch.float32)
            seen.append((rows, None if visible is None else visible.reshape(1, -1)))
        residual = call.left_over(residual, vectors)
        quantized = quantized + vectors
        losses.append(loss)
        if targets is None:
            found.append(result[1])
    if updates and updates[0].book.options.shared_by_stages:
        updates = shared_updates(updates[0].book, updates, seen)
    indices = torch.stack(found, dim=-1) if targets is None else targets
    return StackResult(quantized, indices, torch.stack(losses), updates)
