"""What the residual quantizers of `transformers` share: stages that only encode, decode and hold a codebook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ferrovae.compat.overlay import require_exactly
from ferrovae.ops import nearest_code


@torch.no_grad()
def residual_codes(embeddings: Tensor, stages: Iterable[Any]) -> Tensor:
    """r_0 = x; i_q = argmin_k |r_q - e_q[k]|; r_{q+1} = r_q - e_q[i_q]: embeddings [B, D, T] -> int64 [Q, B, T].

    The codes of `residual_nearest_code`; but that takes one tensor of all codebooks, and these lie apart: to copy them
    together (64 MiB in Mimi) costs as much time as one call saves.
    """
    # Each stage gets what the one before left over in the layout that this has, and the search takes contiguous rows.
    residual = embeddings.transpose(1, 2).to(torch.promote_types(embeddings.dtype, torch.float32)).contiguous()
    grid, residual = residual.shape[:2], residual.flatten(0, 1)
    codes = []
    for stage in stages:
        codebook = stage.codebook.embed
        codes.append(nearest_code(residual, codebook))
        residual = residual - embedding(codes[-1], codebook)
    return torch.stack(codes).unflatten(1, grid)


def check_stages(layers: Iterable[Any], stage: str, codebook: str) -> None:
    """CannotSwapError where a stage or its codebook is not of the class it was made with."""
    for layer in layers:
        require_exactly(layer, stage)
        require_exactly(layer.codebook, codebook)
