"""Residual SimVQ: every stage quantizes, by a codebook under a trained map, what the stages before it left over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ferrovae.nn.quantizers.checks import check_channels, check_floating, require
from ferrovae.nn.quantizers.masked_stages import masked_stages
from ferrovae.nn.quantizers.mixed_radix import check_indices
from ferrovae.nn.quantizers.quantizer_dropout import QuantizerDropout
from ferrovae.nn.quantizers.sim_vq import SimVQ


class ResidualSimVQ(QuantizerDropout):
    """Q stages of `SimVQ` in a row (algorithm 1 of SoundStream, arXiv:2107.03312, with SimVQ, arXiv:2411.02038).

    With r_0 = x:  code_q = the code of stage q nearest to r_q,   r_{q+1} = r_q - code_q,   quantized = sum_q code_q.
    The residual carries no gradient of the codes, so each stage adds its own gradient to x.

    Arguments, results and `state_dict` are those of `vector_quantize_pytorch.ResidualSimVQ` 1.32.

    Args:
        dim: D, channels of x and of a code.
        num_quantizers: Q.
        codebook_size: K, for every stage.
        heads: 1; no other number is possible.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of, quantize_dropout_per_sample:
            train for fewer stages, see `QuantizerDropout`.
        channel_first: x is (B, D, ...).
        rotation_trick: pass gradients to x rotated and scaled as the code lies to it; otherwise unchanged.
        sim_vq_kwargs: other options of each stage's `SimVQ`. A `codebook_transform` is shared by all stages.

    Raises:
        ValueError: `heads` is not 1, or what `SimVQ` and `QuantizerDropout` complain about.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        quantize_dropout_per_sample: bool = False,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        super().__init__(
            num_quantizers,
            quantize_dropout=quantize_dropout,
            quantize_dropout_cutoff_index=quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=quantize_dropout_multiple_of,
            quantize_dropout_per_sample=quantize_dropout_per_sample,
        )
        require(self, heads == 1, f"heads is {heads}, expected 1: a residual stack has no heads")
        self.dim = dim
        self.channel_first = channel_first
        options = {"rotation_trick": rotation_trick, "channel_first": channel_first} | sim_vq_kwargs
        self.layers = nn.ModuleList([SimVQ(dim, codebook_size, **options) for _ in range(num_quantizers)])

    @property
    def codebook_size(self) -> int:
        """K."""
        return self._stages()[0].codebook_size

    @property
    def codebook_dim(self) -> int:
        """D, the dimensions of a code."""
        return self.dim

    @property
    def codebooks(self) -> Tensor:
        """The codes of every stage as its map makes them now, (Q, K, D)."""
        return torch.stack([layer.codebook for layer in self._stages()])

    def dropout_state(self) -> Tensor | None:
        """The first parameter of the maps, if one is trained."""
        return next((parameter for parameter in self.layers.parameters() if parameter.requires_grad), None)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The code of every stage: (B, ..., q) -> (Q, B, ..., D), or (Q, B, D, ...) with `channel_first`.

        -1, and stages beyond q, give zeros; fewer than Q stages need `quantize_dropout`.
        """
        indices = self.complete_stages(indices)
        check_indices(self, indices, self.codebook_size, least=-1)
        codes = torch.stack(
            [
                torch.where((index >= 0)[..., None], embedding(index.clamp(min=0), layer.codebook), 0.0)
                for layer, index in zip(self._stages(), indices.unbind(-1), strict=True)
            ]
        )
        return codes.movedim(-1, 2) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum of the stages' codes, laid out as x: (B, ..., q) -> (B, ..., D) or (B, D, ...)."""
        return self.get_codes_from_indices(indices).sum(dim=0)

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize.

        Args:
            x: (B, ..., D), or (B, D, ...) with `channel_first`; floating point.
            return_all_codes: also return the code of every stage.
            rand_quantize_dropout_fixed_seed: fixes how many stages are kept, where they are dropped: in training.

        Returns:
            quantized: shape and dtype of x.
            indices: int64 (B, ..., Q); -1 where dropped.
            losses: (Q,), the loss of every stage, 0 where dropped; not 0 in eval mode.
            codes: only if asked for, (Q, B, ..., D) or (Q, B, D, ...), zeros where dropped.

        Raises:
            ValueError: x has another shape. TypeError: x is not floating point.
        """
        where = f"(B, {self.dim}, ...)" if self.channel_first else f"(B, ..., {self.dim})"
        require(self, x.ndim >= 2, f"x is {tuple(x.shape)}, expected {where}")
        check_channels(self, x, self.dim, 1 if self.channel_first else -1, where)
        check_floating(self, "x", x)
        tokens = x.movedim(1, -1) if self.channel_first else x
        with torch.autocast(x.device.type, enabled=False):
            quantized, indices, losses = self._quantize(
                tokens.to(torch.promote_types(x.dtype, torch.float32)), rand_quantize_dropout_fixed_seed
            )
        out = quantized.to(x.dtype)
        if self.channel_first:
            out = out.movedim(-1, 1)
        return (
            (out, indices, losses, self.get_codes_from_indices(indices)) if return_all_codes else (out, indices, losses)
        )

    def _quantize(self, x: Tensor, seed: int | Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, ..., D), float32 or float64 -> sums of codes, indices (B, ..., Q) and losses (Q,)."""
        drops = self.training and self.quantize_dropout
        kept = self.kept_stages(x.shape[0], x.device, seed) if drops else None
        return masked_stages(x, self._stages(), kept, lambda layer, residual, rows: layer.quantize_rows(residual, rows))

    def _stages(self) -> list[Any]:
        return list(self.layers)
