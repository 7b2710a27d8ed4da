"""Residual finite scalar quantization: every stage rounds, more finely, what the stages before it left over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import check_floating, require
from ferrovae.nn.quantizers.fsq import FSQ
from ferrovae.nn.quantizers.grouped import GroupedResidual
from ferrovae.nn.quantizers.mixed_radix import check_indices
from ferrovae.nn.quantizers.quantizer_dropout import QuantizerDropout, stage_mask


class ResidualFSQ(QuantizerDropout):
    """Q stages of `FSQ` in a row (algorithm 1 of SoundStream, arXiv:2107.03312, with FSQ, arXiv:2309.15505).

    With r_0 = z and the scale s_q = L^-q of each channel with L levels:

        code_q = s_q FSQ(r_q / s_q),   r_{q+1} = r_q - code_q,   quantized = sum_q code_q.

    The residual carries no gradient of the codes, so each stage adds its own straight-through gradient. z is first
    clamped softly, z -> b tanh(z / b), so that the first stage reaches it.

    Args:
        levels: L_1, ..., L_d, each at least 2; the levels are symmetric about 0, as `FSQ` with `preserve_symmetry`.
        num_quantizers: Q.
        dim: D, the channels of x; by default d. Any other D is projected to d and back by linear layers.
        is_channel_first: x is (B, D, ...).
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of, quantize_dropout_per_sample:
            train for fewer stages, see `QuantizerDropout`.
        soft_clamp_input_value: b, a number or one for each channel. By default 1 + 1 / (L - 1) with
            `bound_hard_clamp`, which excludes another, and no clamp without.
        bound_hard_clamp: the stages clamp to [-1, 1]; otherwise they apply tanh.
        kwargs: other options of each stage's `FSQ`. With `keep_num_codebooks_dim` indices are (B, ..., 1, Q).

    Raises:
        ValueError: a level is too small, or two arguments exclude each other.
        TypeError: a level is not an integer, or an option is unknown.
    """

    soft_clamp_input_value: Tensor | None
    _of_dtype: Tensor

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        quantize_dropout_per_sample: bool = False,
        soft_clamp_input_value: float | Sequence[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_quantizers,
            quantize_dropout=quantize_dropout,
            quantize_dropout_cutoff_index=quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=quantize_dropout_multiple_of,
            quantize_dropout_per_sample=quantize_dropout_per_sample,
        )
        require(
            self,
            soft_clamp_input_value is None or not bound_hard_clamp,
            "soft_clamp_input_value needs bound_hard_clamp=False",
        )
        require(self, kwargs.get("return_indices", True), "return_indices=False: a residual stack returns its indices")
        require(self, not kwargs.get("channel_first", False), "channel_first is a stage's: pass is_channel_first=True")
        require(self, kwargs.get("num_codebooks", 1) == 1, "num_codebooks is a stage's: use GroupedResidualFSQ")
        channels = len(levels)
        self.levels = levels
        self.dim = channels if dim is None else dim
        self.is_channel_first = is_channel_first
        self.has_projections = self.dim != channels
        self.project_in = nn.Linear(self.dim, channels) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(channels, self.dim) if self.has_projections else nn.Identity()
        options = kwargs | {"preserve_symmetry": True, "bound_hard_clamp": bound_hard_clamp}
        if "preserve_symmetry" in kwargs:
            raise TypeError("ResidualFSQ: preserve_symmetry is always on, it is no option")
        self.layers = nn.ModuleList([FSQ(levels, channels, **options) for _ in range(num_quantizers)])
        self.codebook_size = self._stages()[0].codebook_size
        if bound_hard_clamp:
            soft_clamp_input_value = 1 + 1 / (torch.tensor(list(levels)) - 1)
        elif soft_clamp_input_value is not None:
            soft_clamp_input_value = torch.as_tensor(soft_clamp_input_value, dtype=torch.float32)
            require(
                self,
                soft_clamp_input_value.shape in ((), (channels,)),
                f"soft_clamp_input_value is {tuple(soft_clamp_input_value.shape)}, expected a number or ({channels},)",
            )
        self.register_buffer("soft_clamp_input_value", soft_clamp_input_value, persistent=False)
        # a layer without projections or clamp has nothing else that follows `.double()`
        self.register_buffer("_of_dtype", torch.empty(0), persistent=False)

    @property
    def scales(self) -> Tensor:
        """L^-q for every stage and channel, (Q, d) float32: exact in whatever dtype the layer is."""
        levels = self._stages()[0]._levels
        return levels.to(torch.float32) ** -torch.arange(self.num_quantizers, device=levels.device)[:, None]

    @property
    def codebooks(self) -> Tensor:
        """What each stage rounds to before its scale, (Q, K, d); made when asked for."""
        return torch.stack([stage.rotate_back(stage.implicit_codebook) for stage in self._stages()])

    def dropout_state(self) -> Tensor | None:
        """The weight of the projection, if it is trained."""
        weight = getattr(self.project_in, "weight", None)
        return weight if isinstance(weight, Tensor) and weight.requires_grad else None

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The scaled code of every stage: (B, ..., q) -> (Q, B, ..., d), float32, or float64 of a float64 layer.

        -1, and stages beyond q, give zeros; fewer than Q stages need `quantize_dropout`. With `is_channel_first` the
        indices may also lie as `forward` gives them, (B, Q, ...); they are read so where their second axis is Q.
        """
        return self._codes(self._stages_last(indices)[0])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices in eval mode: (B, ..., q) -> (B, ..., D).

        With `is_channel_first`, indices (B, Q, ...) give (B, D, ...). An axis of 1 that the indices keep stays.
        """
        indices, channel_first = self._stages_last(indices)
        quantized = self._codes(indices).sum(dim=0)
        if isinstance(self.project_out, nn.Linear):
            quantized = self.project_out(quantized.to(self.project_out.weight.dtype))
        return quantized.movedim(-1, 1) if channel_first else quantized

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Quantize.

        Args:
            x: (B, ..., D), or (B, D, ...) with `is_channel_first`; floating point.
            return_all_codes: also return the code of every stage.
            rand_quantize_dropout_fixed_seed: fixes how many stages are kept, where they are dropped: in training and
                with gradients enabled.

        Returns:
            quantized: shaped as x. The stages are computed in float32 for any half-precision x.
            indices: (B, ..., Q), or (B, Q, ...) with `is_channel_first`; int32, int64 beyond 2^31 codes and where
                stages are dropped, which have -1.
            codes: only if asked for, (Q, B, ..., d), scaled, zeros where dropped.

        Raises:
            ValueError: x has another shape.
            TypeError: x is not floating point.
        """
        channel_dim = 1 if self.is_channel_first else -1
        expected = f"(B, {self.dim}, ...)" if self.is_channel_first else f"(B, ..., {self.dim})"
        fits = x.ndim >= 2 and x.shape[channel_dim] == self.dim
        require(self, fits, f"x is {tuple(x.shape)}, expected {expected}")
        check_floating(self, "x", x)
        z = self.project_in(x.movedim(channel_dim, -1))
        with torch.autocast(z.device.type, enabled=False):
            quantized, indices = self._quantize(
                z.to(torch.promote_types(z.dtype, torch.float32)), rand_quantize_dropout_fixed_seed
            )
        out = self.project_out(quantized.to(z.dtype)).movedim(-1, channel_dim)
        laid_out = indices.movedim(-1, channel_dim)
        return (out, laid_out, self._codes(indices, quantized.dtype)) if return_all_codes else (out, laid_out)

    def _quantize(self, z: Tensor, seed: int | Tensor | None) -> tuple[Tensor, Tensor]:
        """Vectors (B, ..., d), float32 or float64 -> their sums of codes, and indices (B, ..., Q)."""
        if self.soft_clamp_input_value is not None:
            limit = self.soft_clamp_input_value.to(z.dtype)
            z = (z / limit).tanh() * limit
        drops = self.training and self.quantize_dropout and torch.is_grad_enabled()
        kept = self.kept_stages(z.shape[0], z.device, seed) if drops else None
        residual, quantized, all_indices = z, torch.zeros_like(z), []
        for number, (stage, scale) in enumerate(zip(self._stages(), self.scales, strict=True)):
            codes, indices = stage.quantize_channels(residual / scale)
            codes = codes * scale
            if kept is not None:
                codes = torch.where(stage_mask(kept, number, codes.ndim), codes, 0.0)
                indices = torch.where(stage_mask(kept, number, indices.ndim), indices.to(torch.int64), -1)
            residual = residual - codes.detach()
            quantized = quantized + codes
            all_indices.append(indices[..., None] if stage.keep_num_codebooks_dim else indices)
        return quantized, torch.stack(all_indices, dim=-1)

    def _codes(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, ..., q) -> (Q, B, ..., d), by default of the dtype of the layer, at least float32."""
        if dtype is None:
            dtype = torch.promote_types(self._of_dtype.dtype, torch.float32)
        indices = self.complete_stages(indices)
        check_indices(self, indices, self.codebook_size, least=-1)
        codes = []
        for stage, scale, index in zip(self._stages(), self.scales, indices.unbind(-1), strict=True):
            code = stage.rotate_back(stage._indices_to_codes(index.clamp(min=0)).to(dtype)) * scale
            codes.append(torch.where((index >= 0)[..., None], code, 0.0))
        return torch.stack(codes)

    def _stages_last(self, indices: Tensor) -> tuple[Tensor, bool]:
        """Indices (B, ..., q), and whether they lay as `forward` of a channel-first layer gives them."""
        stages = self.num_quantizers
        laid_as_forward = (
            self.is_channel_first and indices.ndim >= 3 and (indices.shape[1] == stages or indices.shape[-1] > stages)
        )
        return (indices.movedim(1, -1), True) if laid_as_forward else (indices, False)

    def _stages(self) -> list[Any]:
        return list(self.layers)


class GroupedResidualFSQ(GroupedResidual):
    """G `ResidualFSQ` side by side, each over D / G of the channels (HiFi-Codec, arXiv:2305.02765).

    Args:
        dim: D, the channels of x.
        groups: G.
        accept_image_fmap: x is (B, D, H, W).
        kwargs: options of each `ResidualFSQ`, `levels` and `num_quantizers` among them.

    Raises:
        ValueError: G does not divide D.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__(
            dim,
            groups,
            accept_image_fmap,
            lambda channels: ResidualFSQ(dim=channels, **kwargs),
            channel_first=kwargs.get("is_channel_first", False),
        )
        self.codebook_size = self._stacks()[0].codebook_size

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Quantize each group by its own stack; all keep equally many stages.

        Args:
            x: (B, ..., D), or (B, D, H, W) with `accept_image_fmap`; floating point.
            return_all_codes: also return the code of every stage.
            rand_quantize_dropout_fixed_seed: fixes how many stages are kept, where they are dropped.

        Returns:
            quantized, shaped as x; indices (G, B, ..., Q), or (G, B, Q, ...) with `is_channel_first`; if asked for, a
            tuple of G tensors of codes (Q, B, ..., d).
        """
        seed = rand_quantize_dropout_fixed_seed
        seed = self.dropout_seed(x.device) if seed is None else seed
        parts, grid = self.split(x)
        results = [rvq(part, return_all_codes, seed) for rvq, part in zip(self._stacks(), parts, strict=True)]
        quantized, indices, *codes = zip(*results, strict=True)
        out = self.join(quantized, grid), self.stack(indices, grid)
        return (*out, self.restore(codes[0], grid, tokens=2)) if codes else out
