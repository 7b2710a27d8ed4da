"""What the residual quantizers of `transformers` share: stages that only encode, decode and hold a codebook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ferrovae.compat.overlay import require_exactly
from ferrovae.ops import residual_nearest_code


def residual_codes(embeddings: Tensor, stages: Iterable[Any]) -> Tensor:
    """Codes of embeddings [B, D, T] through the codebooks [K, D] of Q stages, the whole stack at once: [Q, B, T]."""
    codes, _ = residual_nearest_code(embeddings.transpose(1, 2), [stage.codebook.embed for stage in stages])
    return codes.permute(2, 0, 1).contiguous()


def check_stages(layers: Iterable[Any], stage: str, codebook: str) -> None:
    """CannotSwapError where a stage or its codebook is not of the class it was made with."""
    for layer in layers:
        require_exactly(layer, stage)
        require_exactly(layer.codebook, codebook)
