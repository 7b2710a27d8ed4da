"""Random-projection quantizer: discrete targets for speech pre-training, from projections that are never trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import check_channels, check_floating, require
from ferrovae.nn.quantizers.vector_quantize import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """The nearest of K random codes to a random projection of x (BEST-RQ; Chiu et al., 2022, arXiv:2202.01855).

    index_h = argmin_k angle(W_h x, e_hk) for each of H codebooks: W_h (dim, D) and the codes are drawn once and frozen,
    so the indices are a fixed function of x, to be predicted where x is masked. H codebooks, K codes, D dimensions.

    Args:
        dim: channels of x.
        codebook_size: K. codebook_dim: D. num_codebooks: H.
        norm: bring each x to mean 0 and variance 1 first, without which few codes would be used.
        kwargs: more arguments of the `VectorQuantize` that holds the codes, e.g. `kmeans_init`.

    The state is `rand_projs` (H, dim, D) and `vq`'s; nothing is a parameter. vector-quantize-pytorch's class of this
    name takes codes of dimension H x D behind another, trainable projection, so its checkpoints do not fit.

    Raises:
        ValueError: a size is below 1, or an argument of `VectorQuantize` is not its.
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
        for name, size in (("dim", dim), ("codebook_dim", codebook_dim), ("num_codebooks", num_codebooks)):
            require(self, size >= 1, f"{name} is {size}, expected at least 1")
        self.dim = dim
        self.num_codebooks = num_codebooks
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = VectorQuantize(
            codebook_dim * num_codebooks,
            codebook_size,
            codebook_dim,
            heads=num_codebooks,
            separate_codebook_per_head=True,
            use_cosine_sim=True,
            **kwargs,
        )
        self.vq.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> RandomProjectionQuantizer:
        """The codes stay frozen in training too."""
        super().train(mode)
        self.vq.eval()
        return self

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """The indices of x, or how well its distances predict given ones.

        Args:
            x: (B, N, dim), floating point.
            indices: (B, N, H) int64, (B, N) with one codebook; -1 is left out.

        Returns:
            int64, shaped as `indices`; with `indices` the mean cross-entropy of softmax(cosine) at them, in nats.

        Raises:
            ValueError: a shape does not fit.
            TypeError: x is not floating point.
        """
        check_floating(self, "x", x)
        check_channels(self, x, self.dim, -1, f"(B, N, {self.dim})")
        projected = torch.einsum("bnd,hde->bnhe", self.norm(x), self.rand_projs.to(x.dtype)).flatten(-2)
        return self.vq(projected, indices=indices)[1]
