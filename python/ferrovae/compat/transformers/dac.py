"""DAC (Kumar et al., 2023, arXiv:2306.06546) as `transformers` has it.

Each stage projects what the one before left over, so there is no lookup through the whole stack; and the stages hold
everything that searches, so the residual quantizer with its losses and its dropout stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ferrovae.compat.adapter import Adapter
from ferrovae.compat.overlay import Overlaid, Overlay
from ferrovae.ops import nearest_code

MODULE = "transformers.models.dac.modeling_dac"


class VectorQuantize(Overlaid):
    """`DacVectorQuantize` with an exact lookup."""

    def decode_latents(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """argmax_k cos(h, e_k): hidden_states [B, D, T] -> the codes [B, D, T] and their indices int64 [B, T]."""
        # A codebook kept elsewhere is fetched by the hook of its forward, and the weight read here is not a forward.
        hook = getattr(self.codebook, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.codebook)
        indices = nearest_code(hidden_states.transpose(1, 2), self.codebook.weight, metric="cosine")
        quantized = self.codebook(indices).transpose(1, 2)
        if hook is not None:
            hook.post_forward(self.codebook, ())
        return quantized, indices


ADAPTERS: dict[tuple[str, str], Adapter] = {(MODULE, "DacVectorQuantize"): Overlay(VectorQuantize)}
