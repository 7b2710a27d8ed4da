"""The quantizer of `diffusers`' VQModel, which is that of VQGAN (Esser et al., 2021, arXiv:2012.09841)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import mse_loss

from ferrovae.compat.adapter import Adapter
from ferrovae.compat.overlay import Overlaid, Overlay
from ferrovae.ops import nearest_code

MODULE = "diffusers.models.autoencoders.vae"


class VectorQuantizer(Overlaid):
    """`VectorQuantizer` with an exact lookup."""

    def forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """argmin_k |z - e_k| at each position, with a straight-through gradient.

        loss = mean |z - sg(e)|^2 + beta mean |sg(z) - e|^2, sg stopping the gradient; beta weighs the first term
        unless `legacy`.

        Args:
            z: [B, D, H, W].

        Returns:
            the codes [B, D, H, W]; the loss, a scalar; and (None, None, int64 indices), which are [B, H, W] with
            `sane_index_shape`, else [B H W], or [B H W, 1] after a `remap`.
        """
        vectors = z.permute(0, 2, 3, 1).contiguous()
        indices = nearest_code(vectors, self.embedding.weight)
        codes = self.embedding(indices)
        commitment, codebook = mse_loss(vectors, codes.detach()), mse_loss(codes, vectors.detach())
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        quantized = (vectors + (codes - vectors).detach()).permute(0, 3, 1, 2).contiguous()
        if self.remap is not None:
            indices = self.remap_to_used(indices.flatten(1)).reshape(-1, 1)
        shape = vectors.shape[:-1] if self.sane_index_shape else indices.shape if self.remap is not None else (-1,)
        return quantized, loss, (None, None, indices.reshape(shape))


ADAPTERS: dict[tuple[str, str], Adapter] = {(MODULE, "VectorQuantizer"): Overlay(VectorQuantizer)}
