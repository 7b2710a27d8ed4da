"""Residual lookup-free quantization: every stage takes the signs, at half the scale, of what the stages before left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import check_channels, check_floating, require
from ferrovae.nn.quantizers.grouped import GroupedResidual
from ferrovae.nn.quantizers.lfq import LFQ
from ferrovae.nn.quantizers.masked_stages import masked_stages
from ferrovae.nn.quantizers.mixed_radix import check_indices
from ferrovae.nn.quantizers.quantizer_dropout import QuantizerDropout
from ferrovae.nn.quantizers.rows import flat_mask


class ResidualLFQ(QuantizerDropout):
    """Q stages of `LFQ` in a row (algorithm 1 of SoundStream, arXiv:2107.03312, with LFQ, arXiv:2310.05737).

    With r_0 = z and the scale s_q = 2^-q:

        code_q = s_q sign(r_q),   r_{q+1} = r_q - code_q,   quantized = sum_q code_q.

    The residual carries no gradient of the codes, so each stage adds its own straight-through gradient.

    Arguments, results and `state_dict` are those of `vector_quantize_pytorch.ResidualLFQ` 1.32.

    Args:
        dim: D, the channels of x; other than log2 `codebook_size` they are projected by linear layers.
        num_quantizers: Q.
        codebook_size: 2^d codes for every stage.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of, quantize_dropout_per_sample:
            train for fewer stages, see `QuantizerDropout`.
        soft_clamp_input_value: of the first stage; it halves with every stage.
        channel_first: x is (B, D, ...); by default where it has four axes or more.
        kwargs: other options of each stage's `LFQ`. With `keep_num_codebooks_dim` indices are (B, ..., 1, Q).

    Raises:
        ValueError: the codebook size is no power of 2, a stage would need a projection or several codebooks, or what
            `LFQ` and `QuantizerDropout` complain about.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        quantize_dropout_per_sample: bool = False,
        soft_clamp_input_value: float | None = None,
        channel_first: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_quantizers,
            quantize_dropout=quantize_dropout,
            quantize_dropout_cutoff_index=quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=quantize_dropout_multiple_of,
            quantize_dropout_per_sample=quantize_dropout_per_sample,
        )
        bits = max(codebook_size - 1, 0).bit_length()
        require(
            self,
            codebook_size == 2**bits > 1,
            f"codebook_size is {codebook_size}, expected a power of 2, such as {2 ** max(bits, 1)}",
        )
        require(self, not kwargs.get("has_projections"), "has_projections is a stage's: the stack projects")
        require(self, kwargs.get("num_codebooks", 1) == 1, "num_codebooks is a stage's: use GroupedResidualLFQ")
        self.dim = dim
        self.codebook_size = codebook_size
        self.codebook_dim = bits
        self.channel_first = channel_first
        self.has_projections = dim != bits
        self.project_in = nn.Linear(dim, bits) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(bits, dim) if self.has_projections else nn.Identity()
        self.layers = nn.ModuleList()
        for stage in range(num_quantizers):
            scale = 2.0**-stage
            clamp = None if soft_clamp_input_value is None else soft_clamp_input_value * scale
            # The stack lays tokens out: a stage sees channels last.
            self.layers.append(
                LFQ(dim=bits, codebook_scale=scale, soft_clamp_input_value=clamp, channel_first=False, **kwargs)
            )

    @property
    def codebooks(self) -> Tensor:
        """The codebook of every stage, (Q, 2^d, d), made when asked for; ValueError beyond 18 bits."""
        return torch.stack([layer.codebook for layer in self._stages()])

    def dropout_state(self) -> Tensor | None:
        """The weight of the projection, if it is trained."""
        weight = getattr(self.project_in, "weight", None)
        return weight if isinstance(weight, Tensor) and weight.requires_grad else None

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The code of every stage: (B, ..., q) -> (Q, B, ..., d).

        -1, and stages beyond q, give zeros; fewer than Q stages need `quantize_dropout`.
        """
        indices = self.complete_stages(indices)
        check_indices(self, indices, self.codebook_size, least=-1)
        codes = [
            torch.where((index >= 0)[..., None], layer.codes_of_indices(index.clamp(min=0)), 0.0)
            for layer, index in zip(self._stages(), indices.unbind(-1), strict=True)
        ]
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices in eval mode, channels last: (B, ..., q) -> (B, ..., D)."""
        return self.project_out(self.get_codes_from_indices(indices).sum(dim=0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize.

        Args:
            x: (B, ..., D), or (B, D, ...) with `channel_first`; floating point.
            mask: bool, (B, N) or the shape of x without its channels; False marks rows that no loss is about.
            return_all_codes: also return the code of every stage.
            rand_quantize_dropout_fixed_seed: fixes how many stages are kept, where they are dropped: in training and
                with gradients enabled.

        Returns:
            quantized: shape and dtype of x.
            indices: int64 (B, ..., Q); -1 where dropped.
            losses: (Q,), the loss of every stage, 0 where dropped.
            codes: only if asked for, (Q, B, ..., d), zeros where dropped.

        Raises:
            ValueError: x or mask has another shape. TypeError: x is not floating point, or mask not bool.
        """
        channel_first = x.ndim >= 4 if self.channel_first is None else self.channel_first
        where = f"(B, {self.dim}, ...)" if channel_first else f"(B, ..., {self.dim})"
        require(self, x.ndim >= 2, f"x is {tuple(x.shape)}, expected {where}")
        check_channels(self, x, self.dim, 1 if channel_first else -1, where)
        check_floating(self, "x", x)
        z = self.project_in(x.movedim(1, -1) if channel_first else x)
        if mask is not None:
            mask = flat_mask(self, mask, z).view(z.shape[:-1])
        with torch.autocast(z.device.type, enabled=False):
            quantized, indices, losses = self._quantize(
                z.to(torch.promote_types(z.dtype, torch.float32)), mask, rand_quantize_dropout_fixed_seed
            )
        out = self.project_out(quantized.to(z.dtype))
        if channel_first:
            out = out.movedim(-1, 1)
        return (
            (out, indices, losses, self.get_codes_from_indices(indices)) if return_all_codes else (out, indices, losses)
        )

    def _quantize(self, z: Tensor, mask: Tensor | None, seed: int | Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (B, ..., d), float32 or float64 -> sums of codes, indices (B, ..., Q) and losses (Q,)."""
        drops = self.training and self.quantize_dropout and torch.is_grad_enabled()
        kept = self.kept_stages(z.shape[0], z.device, seed) if drops else None

        def quantize(layer: Any, residual: Tensor, rows: Tensor | None) -> Any:
            rows = None if rows is None else rows.expand(z.shape[:-1])
            return layer(residual, mask=mask if rows is None else rows if mask is None else rows & mask)

        return masked_stages(z, self._stages(), kept, quantize)

    def _stages(self) -> list[Any]:
        return list(self.layers)


class GroupedResidualLFQ(GroupedResidual):
    """G `ResidualLFQ` side by side, each over D / G of the channels (HiFi-Codec, arXiv:2305.02765).

    Args:
        dim: D, the channels of x.
        groups: G.
        accept_image_fmap: x is (B, D, H, W).
        kwargs: options of each `ResidualLFQ`, `num_quantizers` and `codebook_size` among them. `channel_first=True`
            means x is (B, D, ...).

    Raises:
        ValueError: G does not divide D, or what `ResidualLFQ` complains about.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        # The groups lay tokens out: a stack sees channels last.
        channel_first = bool(kwargs.pop("channel_first", False))
        super().__init__(
            dim,
            groups,
            accept_image_fmap or channel_first,
            lambda channels: ResidualLFQ(dim=channels, channel_first=False, **kwargs),
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Quantize each group by its own stack; all keep equally many stages.

        Args:
            x: (B, ..., D), or (B, D, H, W) with `accept_image_fmap`; floating point.
            mask: bool, (B, N) or the shape of x without its channels, for all groups.
            return_all_codes: also return the code of every stage.
            rand_quantize_dropout_fixed_seed: fixes how many stages are kept, where they are dropped.

        Returns:
            quantized, shaped as x; indices (G, B, ..., Q); losses (G, Q); if asked for, a tuple of each group's codes,
            (Q, B, ..., d).
        """
        seed = rand_quantize_dropout_fixed_seed
        seed = self.dropout_seed(x.device) if seed is None else seed
        parts, grid = self.split(x)
        if mask is not None and grid is not None and mask.ndim > 2:
            mask = mask.flatten(1)
        results = [rvq(part, mask, return_all_codes, seed) for rvq, part in zip(self._stacks(), parts, strict=True)]
        quantized, indices, losses, *codes = zip(*results, strict=True)
        out = self.join(quantized, grid), self.stack(indices, grid), self.stack(losses, None)
        return (*out, tuple(self.stack(codes[0], grid, tokens=2))) if codes else out
