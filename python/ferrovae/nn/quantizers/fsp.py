"""Finite scalar perturbation: scalars mapped to [0, 1], and in training either quantized or moved within a bin."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.cdf_activations import cdf_activation
from ferrovae.nn.quantizers.checks import check_floating, require
from ferrovae.nn.quantizers.mixed_radix import check_indices, digits_to_indices, indices_to_digits, radix_buffers
from ferrovae.nn.quantizers.vector_norm import VectorNorm


class FSP(nn.Module):
    """Finite scalar perturbation (arXiv:2602.17133).

    With a cumulative distribution function F, channel i of L_i levels becomes u_i = F(z_i) in [0, 1], which falls into
    bin k_i = floor(u_i L_i), and is replaced by its middle (k_i + 1/2) / L_i, with the gradient of the identity. In
    training each element stays unquantized with probability 1 - `quantize_rate`: u_i moves by noise uniform on
    +-1 / (2 L_i), unless that leads out of (0, 1). The code is (u - 1/2) sqrt(12), of unit variance where u is
    uniform, or F^-1(u). The index is the mixed-radix number of the k_i, the first channel the fastest.

    Args:
        levels: L_1, ..., L_d.
        dim: D, the channels of z; by default d. Any other D is projected to d and back by linear layers.
        channel_first: z is (B, D, ...).
        projection_has_bias: whether the linear layers have a bias.
        act_name: F: tanh ((tanh z + 1) / 2), sigmoid, normal, laplace or cauchy.
        quantize_rate: the share of elements quantized in training; 0 perturbs all.
        need_inv_act: the code is F^-1(u), with the gradient of the identity.
        vector_norm: the penalty on the moments of z, a preset of `VectorNorm`.

    Raises:
        ValueError: an argument is out of range, or a name unknown.
        TypeError: a level is not an integer.
    """

    _levels: Tensor
    _basis: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        act_name: str = "tanh",
        quantize_rate: float = 0.0,
        need_inv_act: bool = False,
        vector_norm: str = "var_tanh",
    ) -> None:
        super().__init__()
        require(self, 0 <= quantize_rate <= 1, f"quantize_rate is {quantize_rate}, expected a number from 0 to 1")
        radix_buffers(self, list(levels), least=1)
        self.codebook_dim = len(levels)
        self.codebook_size = prod(levels)
        self.dim = self.codebook_dim if dim is None else dim
        require(self, self.dim >= 1, f"dim is {self.dim}, expected at least 1")
        self.channel_first = channel_first
        self.has_projections = self.dim != self.codebook_dim
        width, bias = self.codebook_dim, projection_has_bias
        self.project_in = nn.Linear(self.dim, width, bias=bias) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(width, self.dim, bias=bias) if self.has_projections else nn.Identity()
        self.act_name = act_name
        self.act_func, self.inv_act_func = cdf_activation("FSP", act_name)
        self.need_inv_act = need_inv_act
        self.quantize_rate = quantize_rate
        self.vector_norm = VectorNorm.build(vector_norm)

    def quantize_act_value(self, act_z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """u (..., d) in [0, 1] -> middles of the bins, with the gradient of u, and the bins as whole numbers.

        eps: how far 1, which would fall into a bin of its own, is moved down.
        """
        levels = (act_z.detach().clamp_max(1 - eps) * self._levels).floor()
        middles = (levels + 0.5) / self._levels
        return middles + (act_z - act_z.detach()), levels

    def level_indices_to_indices(self, level_indices: Tensor) -> Tensor:
        """Bins (..., d) -> indices (...), int32 (int64 beyond 2^31 codes); 0 for a row with a NaN."""
        return digits_to_indices(level_indices, self._basis, self.codebook_size)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Indices (...) -> bins (..., d), integers in [0, L_i)."""
        return indices_to_digits(indices, self._levels, self._basis)

    def indices_to_act_value(self, indices: Tensor) -> Tensor:
        """Indices (...) -> middles of the bins, (..., d) float32."""
        return (self.indices_to_level_indices(indices).to(torch.float32) + 0.5) / self._levels

    def indices_to_codes(self, indices: Tensor, eps: float = 1e-6) -> Tensor:
        """What `forward` gives for indices (B, ...) in eval mode, laid out as its input.

        eps: how far from 0 and 1 F^-1 is taken.
        """
        check_indices(self, indices, self.codebook_size)
        codes = self._codes(self.indices_to_act_value(indices), eps)
        if isinstance(self.project_out, nn.Linear):
            codes = self.project_out(codes.to(self.project_out.weight.dtype))
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, z: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Perturb or quantize.

        Args:
            z: (..., D), or (B, D, ...) with `channel_first`; floating point.
            eps: how far from 1 (and, for F^-1, from 0) u is kept; by default the resolution of its dtype, float32 for
                half precision.

        Returns:
            quantized: shaped as z; in eval mode the codes.
            indices: int32 (int64 beyond 2^31 codes), the shape of z without its channels; a vector with a NaN has 0.
            norm_loss: [], the penalty on the moments of the projected z, in training and evaluation.
            info: `level_indices`, the bins, (..., d), floating point; `norm_info`, the moments by name, (d,); in
                training with a `quantize_rate` under 1 also `p_accept_prob` [], the share of moves that stay in (0, 1).

        Raises:
            ValueError: z has another shape.
            TypeError: z is not floating point.
        """
        channel_dim = 1 if self.channel_first else -1
        expected = f"(B, {self.dim}, ...)" if self.channel_first else f"(..., {self.dim})"
        fits = z.ndim >= (2 if self.channel_first else 1) and z.shape[channel_dim] == self.dim
        require(self, fits, f"z is {tuple(z.shape)}, expected {expected}")
        check_floating(self, "z", z)
        projected = self.project_in(z.movedim(channel_dim, -1))
        dtype, shape = projected.dtype, projected.shape
        with torch.autocast(z.device.type, enabled=False):
            rows = projected.to(torch.promote_types(dtype, torch.float32)).reshape(-1, self.codebook_dim)
            # of half precision it would shut the last of many bins
            eps = eps or torch.finfo(rows.dtype).eps
            norm_loss, moments = self.vector_norm(rows)
            act = self.act_func(rows)
            value, levels = self.quantize_act_value(act, eps)
            info: dict[str, Any] = {"level_indices": levels.view(shape), "norm_info": moments}
            if self.training and self.quantize_rate < 1:
                value, info["p_accept_prob"] = self._perturb(act, value)
            codes = self._codes(value, eps)
            if self.need_inv_act:
                codes = codes.detach() + (rows - rows.detach())
            indices = self.level_indices_to_indices(levels).view(shape[:-1])
        return self.project_out(codes.to(dtype).view(shape)).movedim(-1, channel_dim), indices, norm_loss, info

    def _perturb(self, act: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """Each element perturbed or quantized, and the share of moves accepted."""
        proposal = act + (torch.rand_like(act) * 2 - 1) / (self._levels * 2)
        accepted = (proposal > 0) & (proposal < 1)
        perturbed = torch.where(accepted, proposal, act)
        stays = torch.rand_like(quantized) > self.quantize_rate
        return torch.where(stays, perturbed, quantized), accepted.to(torch.float32).mean()

    def _codes(self, value: Tensor, eps: float) -> Tensor:
        if self.need_inv_act:
            return self.inv_act_func(value.clamp(eps, 1 - eps))
        return (value - 0.5) * sqrt(12)

    def extra_repr(self) -> str:
        return f"levels={self._levels.tolist()}, dim={self.dim}, act_name={self.act_name!r}, " + (
            f"quantize_rate={self.quantize_rate}, need_inv_act={self.need_inv_act}"
        )
