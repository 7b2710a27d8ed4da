"""Random-projection quantizer as vector-quantize-pytorch 1.32 computes it, for checkpoints made with it.

`ferrovae.nn.RandomProjectionQuantizer` is the one of the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """Labels for masked prediction: the nearest code of a random projection (BEST-RQ, arXiv:2202.01855).

    Unlike in the paper the codebooks have `num_codebooks * codebook_dim` dimensions each, and from two codebooks on a
    second, trainable projection (`vq.project_in`) leads there; that is what makes the state_dict what it is.

    Args:
        dim: channels D of the input.
        codebook_size: K.
        codebook_dim: dimensions E of a random projection.
        num_codebooks: H, each with a projection of its own.
        norm: normalize the input to mean 0 and variance 1 over its channels first.
        kwargs: of the `VectorQuantize` inside.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.num_codebooks = num_codebooks
        self.rand_projs: Tensor
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        options: dict[str, Any] = {"heads": num_codebooks, "separate_codebook_per_head": True, "use_cosine_sim": True}
        self.vq = VectorQuantize(codebook_dim * num_codebooks, codebook_size, **options, **kwargs)

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> int64 (B, N, H), (B, N) for one codebook; with `indices` the cross-entropy to them, in nats.

        The codebooks never change: the quantizer inside is put into eval mode.
        """
        projected = torch.einsum("bnd,hde->bnhe", self.norm(x), self.rand_projs).flatten(2)
        self.vq.eval()
        if indices is None:
            return self.vq(projected)[1]
        return self.vq(projected, indices=indices)[1]
