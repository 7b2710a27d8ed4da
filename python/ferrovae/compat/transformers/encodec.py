"""EnCodec (Défossez et al., 2022, arXiv:2210.13438) as `transformers` has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ferrovae.compat.adapter import Adapter
from ferrovae.compat.overlay import Overlaid, Overlay
from ferrovae.compat.transformers.residual import check_stages, residual_codes
from ferrovae.ops import nearest_code

MODULE = "transformers.models.encodec.modeling_encodec"


class EuclideanCodebook(Overlaid):
    """`EncodecEuclideanCodebook` with an exact lookup."""

    embed: Tensor

    def quantize(self, hidden_states: Tensor) -> Tensor:
        """argmin_k |h - e_k|: hidden_states [N, D] -> int64 [N]."""
        return nearest_code(hidden_states, self.embed)


class ResidualVectorQuantizer(Overlaid):
    """`EncodecResidualVectorQuantizer` with an exact lookup in each stage.

    What a stage leaves over is float32 also in a bfloat16 model.
    """

    layers: nn.ModuleList

    def encode(self: Any, embeddings: Tensor, bandwidth: float | None = None) -> Tensor:
        """embeddings [B, D, T] -> int64 [Q, B, T], with as many stages Q as the bandwidth (kbit/s) pays for."""
        stages = self.get_num_quantizers_for_bandwidth(bandwidth)
        # A list: a slice of a ModuleList would make a module of all these stages, at every call.
        return residual_codes(embeddings, list(self.layers)[:stages])


def _check(module: Any) -> None:
    check_stages(module.layers, "EncodecVectorQuantization", "EncodecEuclideanCodebook")


ADAPTERS: dict[tuple[str, str], Adapter] = {
    (MODULE, "EncodecEuclideanCodebook"): Overlay(EuclideanCodebook),
    (MODULE, "EncodecResidualVectorQuantizer"): Overlay(ResidualVectorQuantizer, _check),
}
