"""A residual stack that goes through all its stages and masks those that quantizer dropout drops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ferrovae.nn.quantizers.quantizer_dropout import stage_mask

# A stage, its residuals (B, ..., D), and which of their rows are kept, broadcasting to (B, ...), or None for all
# -> codes (B, ..., D), indices (B, ...), loss.
Quantize = Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def masked_stages(
    x: Tensor, stages: Sequence[Any], kept: Tensor | None, quantize: Quantize
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of codes (B, ..., D), indices (B, ..., Q), -1 where dropped, and losses (Q,), 0 where dropped.

    x: (B, ..., D). kept: how many stages are, int64 [], or [B] for each sample; None: all. A stage sees what the codes
    before it left over, and no gradient goes through those.
    """
    residual, quantized = x, torch.zeros_like(x)
    all_indices, losses = [], []
    for number, stage in enumerate(stages):
        rows = stage_mask(kept, number, x.ndim - 1) if kept is not None and kept.ndim else None
        codes, indices, loss = quantize(stage, residual, rows)
        if kept is not None:
            codes = torch.where(stage_mask(kept, number, codes.ndim), codes, 0.0)
            indices = torch.where(stage_mask(kept, number, indices.ndim), indices, -1)
            loss = torch.where((kept > number).any(), loss, 0.0)
        residual = residual - codes.detach()
        quantized = quantized + codes
        all_indices.append(indices)
        losses.append(loss)
    return quantized, torch.stack(all_indices, dim=-1), torch.stack(losses)
