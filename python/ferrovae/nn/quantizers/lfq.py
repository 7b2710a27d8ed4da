"""Lookup-free quantization: each entry of a vector is replaced by its sign."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from ferrovae.nn.quantizers.checks import check_channels, check_floating, require
from ferrovae.nn.quantizers.cosine_sim_linear import CosineSimLinear
from ferrovae.nn.quantizers.mixed_radix import check_indices
from ferrovae.nn.quantizers.rank_sum import RankSum
from ferrovae.nn.quantizers.rows import flat_mask, mean_square, random_share
from ferrovae.nn.quantizers.sign_codes import (
    MOST_BITS,
    MOST_BITS_OF_A_TABLE,
    all_bits,
    bit_values,
    bits_of_indices,
    indices_of_bits,
)
from ferrovae.nn.quantizers.sign_entropies import sign_entropies
from ferrovae.nn.quantizers.straight_through import straight_through


class LFQReturn(NamedTuple):
    """What `LFQ` returns."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LFQLossBreakdown(NamedTuple):
    """The terms of LFQ's loss, each a scalar before its weight, 0 in eval mode; entropies in nats."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class LFQ(nn.Module):
    """Signs of d numbers as one of 2^d codes, without a table of them (Yu et al., 2023, arXiv:2310.05737).

    A vector becomes s sign(x) in {-s, s}^d; its index holds the bits x_i > 0, the first most significant. The loss is

        w (mean_n H(q_n) - gamma H(mean_n q_n)) + w_c mean (x - s sign(x))^2,    q_n(c) = softmax_c 2 T <x_n, c>:

    sure of each vector, and using all codes alike. Both entropies are exact up to 18 bits a codebook and use
    O(2^d + N 2^(d/2)) memory; from 19 to 62 bits the second is the sum over ceil(d / 18) runs of bits, an upper bound.
    Under `torch.distributed` the mean of q is over the rows of all ranks, each counted once, by one all-reduce a step.

    Arguments, results and `state_dict` are those of `vector_quantize_pytorch.LFQ` 1.32.

    Args:
        dim: channels of the input; default `num_codebooks` log2 `codebook_size`.
        codebook_size: 2^d codes; default 2^dim.
        entropy_loss_weight: w.
        commitment_loss_weight: w_c.
        diversity_gamma: gamma.
        straight_through_activation: applied to x where the gradient passes; the values remain the codes.
        num_codebooks: C, codebooks side by side, each with d of the C d numbers; entropies are averaged over them.
        keep_num_codebooks_dim: indices have a last axis C; by default where C > 1, which needs it.
        codebook_scale: s.
        frac_per_sample_entropy: the share of rows, drawn at random by torch's generator, that the entropies look at.
        has_projections: linear maps `project_in`, `project_out` around the codes; by default where dim != C d.
        projection_has_bias: these maps have biases.
        soft_clamp_input_value: a >= s; x becomes a tanh(x / a) first.
        cosine_sim_project_in: `project_in` gives cosines times a scale, `cosine_sim_project_in_scale` (default: s).
        channel_first: x is (B, dim, ...); by default where it has four axes or more.
        experimental_softplus_entropy_loss: the entropy loss e becomes log(1 + exp(e + `entropy_loss_offset`)).
        spherical: vectors and codes have length s: binary spherical quantization (Zhao et al., 2024, arXiv:2406.07548).
        force_quantization_f32: quantize in float32, whatever dtype x has.
        orthogonal_rotation: quantize in a randomly rotated basis, a buffer.
        sync_timeout: seconds to wait for the means of other ranks before saying who is missing; see `forward`.

    Raises:
        ValueError: neither or a wrong size is given, more than 62 bits, a scale, share or time out of range, arguments
            that exclude each other.
    """

    mask: Tensor
    zero: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: Callable[[Tensor], Tensor] | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
        sync_timeout: float = 60.0,
    ) -> None:
        super().__init__()
        require(self, num_codebooks >= 1, f"num_codebooks is {num_codebooks}, expected at least 1")
        codebook_dim = self._bits(dim, codebook_size)
        codebook_dims = codebook_dim * num_codebooks
        dim = codebook_dims if dim is None else dim
        has_projections = dim != codebook_dims if has_projections is None else has_projections
        require(
            self,
            has_projections or dim == codebook_dims,
            f"has_projections=False needs dim = {codebook_dims}, {num_codebooks} codebooks of {codebook_dim} bits; it "
            f"is {dim}",
        )
        keeps = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        require(
            self, keeps or num_codebooks == 1, f"num_codebooks={num_codebooks} excludes keep_num_codebooks_dim=False"
        )
        require(self, codebook_scale > 0, f"codebook_scale is {codebook_scale}, expected a positive number")
        require(
            self,
            0 < frac_per_sample_entropy <= 1,
            f"frac_per_sample_entropy is {frac_per_sample_entropy}, expected a number over 0 and up to 1",
        )
        require(
            self,
            soft_clamp_input_value is None or soft_clamp_input_value >= codebook_scale,
            f"soft_clamp_input_value is {soft_clamp_input_value}, expected at least codebook_scale, {codebook_scale}",
        )
        require(self, 0 < sync_timeout < math.inf, f"sync_timeout is {sync_timeout}, expected a positive number")
        self.dim = dim
        self.codebook_size: int = 2**codebook_dim
        self.codebook_dim = codebook_dim
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim = keeps
        self.codebook_scale = codebook_scale
        self.has_projections = has_projections
        self.channel_first = channel_first
        self.entropy_loss_weight = entropy_loss_weight
        self.commitment_loss_weight = commitment_loss_weight
        self.diversity_gamma = diversity_gamma
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.soft_clamp_input_value = soft_clamp_input_value
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.entropy_loss_offset = entropy_loss_offset
        self.spherical = spherical
        self.force_quantization_f32 = force_quantization_f32
        self.orthogonal_rotation = orthogonal_rotation
        self.activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if has_projections and cosine_sim_project_in:
            scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
            self.project_in = CosineSimLinear(dim, codebook_dims, scale)
        elif has_projections:
            self.project_in = nn.Linear(dim, codebook_dims, bias=projection_has_bias)
        if has_projections:
            self.project_out = nn.Linear(codebook_dims, dim, bias=projection_has_bias)
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(codebook_dim, codebook_dim)))
        self.register_buffer("mask", bit_values(codebook_dim))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self._sum_over_ranks = RankSum(f"LFQ(dim={dim}, codebook_size={self.codebook_size})", sync_timeout)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}mask", self.mask)  # which no layer of upstream's 1.9.0 kept
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _bits(self, dim: int | None, codebook_size: int | None) -> int:
        if codebook_size is None:
            require(self, dim is not None, "neither dim nor codebook_size is given, expected one of them or both")
            bits = dim or 0
        else:
            bits = max(codebook_size - 1, 0).bit_length()
            require(
                self,
                codebook_size == 2**bits,
                f"codebook_size is {codebook_size}, expected a power of 2, such as {2**bits}",
            )
        require(self, 1 <= bits <= MOST_BITS, f"a codebook has {bits} bits, expected 1 to {MOST_BITS}")
        return bits

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return self.zero.dtype

    @property
    def codebook(self) -> Tensor:
        """All codes in order, (2^d, d) in {-s, s}, made when asked for; ValueError beyond 18 bits.

        They are neither set to length s (`spherical`) nor rotated, as upstream's are not.
        """
        require(
            self,
            self.codebook_dim <= MOST_BITS_OF_A_TABLE,
            f"the codebook has 2^{self.codebook_dim} codes, expected at most 2^{MOST_BITS_OF_A_TABLE} for a table of "
            "them; use indices_to_codes",
        )
        return self.bits_to_codes(all_bits(self.mask).to(self.dtype))

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """0 and 1 become -s and s."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """What `forward` gives for these indices in eval mode.

        Args:
            indices: (B, ...), with a last axis C where `keep_num_codebooks_dim`; integers in [0, 2^d).
            project_out: False gives the codes (..., C d) themselves.

        Returns:
            (B, ..., dim), or (B, dim, ...) for `channel_first`, by default where there are two axes beside B and C.

        Raises:
            ValueError: an index is out of range. TypeError: they are not integers.
        """
        check_indices(self, indices, self.codebook_size)
        if not self.keep_num_codebooks_dim:
            indices = indices[..., None]
        return self.output_of_indices(indices, self.is_channel_first(indices.ndim), project_out)

    def output_of_indices(self, indices: Tensor, channel_first: bool, project_out: bool = True) -> Tensor:
        """The same of indices (B, ..., C) that are known to be in range."""
        codes = self.codes_of_indices(indices).flatten(-2)
        if project_out:
            codes = self.project_out(codes)
        return codes.movedim(-1, 1) if channel_first else codes

    def codes_of_indices(self, indices: Tensor) -> Tensor:
        """The code of each index by itself, known to be in range: (...) -> (..., d)."""
        return self._rotated_back(self._codes(bits_of_indices(indices, self.mask), self.dtype))

    def forward(
        self,
        x: Tensor,
        inv_temperature: float | Tensor = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> LFQReturn | tuple[LFQReturn, LFQLossBreakdown]:
        """Quantize.

        Args:
            x: (B, dim), (B, N, dim) or, with four axes or more or `channel_first`, (B, dim, ...); floating point.
            inv_temperature: T of the entropies, positive.
            return_loss_breakdown: return the terms of the loss as well.
            mask: bool, (B, N) or shaped as the indices of one codebook; False marks rows that take no part in the loss.

        Returns:
            quantized: shape and dtype of x; in training with the gradient of x itself (of its activation).
            indices: int64, the shape of x without its channels, and with a last axis C if `keep_num_codebooks_dim`.
            entropy_aux_loss: scalar, float32 (float64 where quantized in float64); 0 in eval mode, and 0 where no row
                counts. A row with a NaN makes it NaN; the bit of a NaN is 0.

        Raises:
            ValueError: x or mask has another shape, T is not positive. TypeError: x is not floating point, or mask not
                bool. RuntimeError: another rank sent nothing within `sync_timeout`, or what does not belong to it.
        """
        channel_first = self.is_channel_first(x.ndim)
        where = f"(B, {self.dim}, ...)" if channel_first else f"(B, ..., {self.dim})"
        check_channels(self, x, self.dim, 1 if channel_first else -1, where)
        require(self, x.ndim >= 2, f"x is {tuple(x.shape)}, expected {where}")
        check_floating(self, "x", x)
        if channel_first:
            x = x.movedim(1, -1)
        rows = None if mask is None else flat_mask(self, mask, x)
        x = self.project_in(x)
        if self.soft_clamp_input_value is not None:
            x = (x / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        x = x.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            x = x @ self.orthogonal_rot.to(x.dtype)  # a stack of bfloat16 quantizes in float32
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            if self.force_quantization_f32:
                x = x.float()
            if self.spherical:
                x = normalize(x, dim=-1) * self.codebook_scale
            bits = x > 0
            codes = self._codes(bits, x.dtype)
            indices = indices_of_bits(bits, self.mask)
            loss, breakdown = self._loss(x, codes, inv_temperature, rows)
            quantized = straight_through(self.activation(x), codes) if self.training else codes
            quantized = quantized.to(dtype)
        quantized = self.project_out(self._rotated_back(quantized).flatten(-2))
        if channel_first:
            quantized = quantized.movedim(-1, 1)
        if not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        result = LFQReturn(quantized, indices, loss)
        return (result, breakdown) if return_loss_breakdown else result

    def _loss(
        self, x: Tensor, codes: Tensor, inv_temperature: float | Tensor, rows: Tensor | None
    ) -> tuple[Tensor, LFQLossBreakdown]:
        """x, codes: (..., C, d); rows: bool (N,), those that count."""
        zero = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        if not self.training:
            return zero, LFQLossBreakdown(zero, zero, zero)
        x, codes = x.flatten(0, -3), codes.flatten(0, -3)
        per_sample, batch = self._entropies(x, inv_temperature, rows)
        entropy = per_sample - self.diversity_gamma * batch
        if self.experimental_softplus_entropy_loss:
            entropy = softplus(entropy + self.entropy_loss_offset)
        commitment = zero
        if self.commitment_loss_weight > 0:
            commitment = mean_square(x.to(zero.dtype) - codes.to(zero.dtype), None if rows is None else rows[:, None])
        loss = entropy * self.entropy_loss_weight + commitment * self.commitment_loss_weight
        return loss, LFQLossBreakdown(per_sample, batch, commitment)

    def _entropies(self, x: Tensor, inv_temperature: float | Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.frac_per_sample_entropy < 1:
            rows = random_share(rows, x.shape[0], self.frac_per_sample_entropy, x.device)
        if isinstance(inv_temperature, Tensor):
            x, inv_temperature = x * inv_temperature, 1.0
        require(self, inv_temperature > 0, f"inv_temperature is {inv_temperature}, expected a positive number")
        return sign_entropies(x, float(inv_temperature), self._magnitude(), rows, self._sum_over_ranks)

    def _magnitude(self) -> float:
        """Of the entries of a code."""
        return self.codebook_scale / math.sqrt(self.codebook_dim) if self.spherical else self.codebook_scale

    def _codes(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        magnitude = torch.full((), self._magnitude(), dtype=dtype, device=bits.device)
        return torch.where(bits, magnitude, -magnitude)

    def _rotated_back(self, codes: Tensor) -> Tensor:
        return codes @ self.orthogonal_rot.t().to(codes.dtype) if self.orthogonal_rotation else codes

    def is_channel_first(self, ndim: int) -> bool:
        """Whether an input of so many axes has its channels on axis 1."""
        return ndim >= 4 if self.channel_first is None else self.channel_first
