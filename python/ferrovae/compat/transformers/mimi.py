"""Mimi (Défossez et al., 2024, arXiv:2410.00037) as `transformers` has it.

Its split quantizer only hands on to two residual ones, so it needs nothing of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ferrovae.compat.adapter import Adapter
from ferrovae.compat.overlay import Overlaid, Overlay
from ferrovae.compat.transformers.residual import check_stages, residual_codes
from ferrovae.ops import nearest_code

MODULE = "transformers.models.mimi.modeling_mimi"


class EuclideanCodebook(Overlaid):
    """`MimiEuclideanCodebook` with an exact lookup."""

    embed: Tensor

    def quantize(self, hidden_states: Tensor) -> Tensor:
        """argmin_k |h - e_k|: hidden_states [N, D] -> int64 [N]."""
        return nearest_code(hidden_states, self.embed)


class ResidualVectorQuantizer(Overlaid):
    """`MimiResidualVectorQuantizer` with an exact lookup in each stage.

    What a stage leaves over is float32 also in a bfloat16 model.
    """

    def encode(self: Any, embeddings: Tensor, num_quantizers: int | None = None) -> Tensor:
        """embeddings [B, C, T] -> int64 [Q, B, T], with the first `num_quantizers` stages (all, if None)."""
        if self.input_proj is not None:
            embeddings = self.input_proj(embeddings)
        stages = self.num_quantizers if num_quantizers is None else num_quantizers
        # A list: a slice of a ModuleList would make a module of all these stages, at every call.
        return residual_codes(embeddings, list(self.layers)[:stages])


def _check(module: Any) -> None:
    check_stages(module.layers, "MimiVectorQuantization", "MimiEuclideanCodebook")


ADAPTERS: dict[tuple[str, str], Adapter] = {
    (MODULE, "MimiEuclideanCodebook"): Overlay(EuclideanCodebook),
    (MODULE, "MimiResidualVectorQuantizer"): Overlay(ResidualVectorQuantizer, _check),
}
