"""The random-projection quantizer of vector-quantize-pytorch as it is, for checkpoints made with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn import VectorQuantize

__all__ = ["RandomProjectionQuantizer"]


class RandomProjectionQuantizer(nn.Module):
    """As `vector_quantize_pytorch.RandomProjectionQuantizer` 1.32: same arguments, indices and `state_dict`.

    Its codes have dimension H x D, behind a second linear map that is drawn at random and is a parameter of the model.
    For codes of the dimension asked for, and nothing to train by accident: `ferrovae.nn.RandomProjectionQuantizer`.

    Args:
        dim: channels of x. codebook_size: K. codebook_dim: D. num_codebooks: H.
        norm: bring each x to mean 0 and variance 1 first.
        kwargs: more arguments of `VectorQuantize`.
    """

    rand_projs: Tensor

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
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = VectorQuantize(
            codebook_dim * num_codebooks,
            codebook_size,
            heads=num_codebooks,
            separate_codebook_per_head=True,
            use_cosine_sim=True,
            **kwargs,
        )

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Indices (B, N, H) int64, (B, N) for one codebook, of x (B, N, dim); or the cross-entropy at given ones."""
        projected = torch.einsum("bnd,hde->bnhe", self.norm(x), self.rand_projs).flatten(-2)
        self.vq.eval()
        return self.vq(projected, indices=indices)[1]
