"""Finite scalar quantization: every channel rounded to a few levels; the codebook is their product."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import check_floating, require
from ferrovae.nn.quantizers.mixed_radix import check_indices, digits_to_indices, indices_to_digits, radix_buffers
from ferrovae.nn.quantizers.older_state import drop_constants


class FSQ(nn.Module):
    """Finite scalar quantization (Mentzer et al., 2023, arXiv:2309.15505).

    Channel i, with L_i levels, is bounded and rounded to whole numbers, with the gradient of the identity through the
    rounding, and scaled to [-1, 1]:

        h_i = (L_i - 1) (1 + eps) / 2,   o_i = 1/2 for even L_i, 0 for odd,   eps = 1e-3
        code_i = round(h_i tanh(z_i + atanh(o_i / h_i)) - o_i) / floor(L_i / 2)

    or, with `preserve_symmetry` (Parker et al., 2024, arXiv:2411.19842, section 3.2),

        code_i = 2 / (L_i - 1) floor((L_i - 1) (tanh(z_i) + 1) / 2 + 1/2) - 1.

    The index of a code is the mixed-radix number of its d levels, the first channel the fastest; it is arithmetic, so
    no memory grows with K = prod(L_i).

    Args:
        levels: L_1, ..., L_d, each at least 3, or 2 with `preserve_symmetry`.
        dim: D, the channels of x; by default c d. Any other D is projected to c d and back by linear layers.
        num_codebooks: c, how many groups of d channels are quantized alike.
        keep_num_codebooks_dim: indices keep an axis of c; by default where c > 1, which needs it.
        scale: kept as an attribute, without effect.
        allowed_dtypes: the dtypes that `force_quantization_f32` lets pass; it widens any other to float32.
        channel_first: x is (B, D, ...), as it always is with 4 axes or more.
        projection_has_bias: whether the linear layers have a bias.
        return_indices: otherwise indices are None.
        force_quantization_f32: quantize in float32 whatever the dtype of x, and outside autocast. Otherwise only what
            is bounded and rounded is float32, and a rotation has the dtype of x.
        preserve_symmetry: levels symmetric about 0, -1 and 1 among them.
        noise_dropout: the probability, in training, with which an element of the code gets noise uniform on
            [-1/2, 1/2), clamped to [-1, 1]; needs `preserve_symmetry`. Indices are those without noise.
        bound_hard_clamp: clamp to [-1, 1] in place of tanh (and of atanh), for inputs bounded already.
        orthogonal_rotation: rotate the d channels by a fixed random rotation before, and back after (QuIP,
            arXiv:2307.13304). Meant for equal levels; warns otherwise.

    Raises:
        ValueError: a level is too small, or two arguments exclude each other.
        TypeError: a level is not an integer.
    """

    _levels: Tensor
    _basis: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        radix_buffers(self, list(levels))
        require(self, preserve_symmetry or min(levels) > 2, f"levels is {list(levels)}: 2 needs preserve_symmetry=True")
        require(self, 0 <= noise_dropout <= 1, f"noise_dropout is {noise_dropout}, expected a probability")
        require(self, preserve_symmetry or noise_dropout == 0, "noise_dropout needs preserve_symmetry=True")
        require(self, num_codebooks >= 1, f"num_codebooks is {num_codebooks}, expected at least 1")
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        require(
            self,
            keep or num_codebooks == 1,
            f"keep_num_codebooks_dim=False needs num_codebooks=1, got {num_codebooks}",
        )
        self.codebook_dim = len(levels)
        self.codebook_size = prod(levels)
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = keep
        self.dim = self.effective_codebook_dim if dim is None else dim
        require(self, self.dim >= 1, f"dim is {self.dim}, expected at least 1")
        self.scale = scale
        self.allowed_dtypes = allowed_dtypes
        self.channel_first = channel_first
        self.return_indices = return_indices
        self.force_quantization_f32 = force_quantization_f32
        self.preserve_symmetry = preserve_symmetry
        self.noise_dropout = noise_dropout
        self.bound_hard_clamp = bound_hard_clamp
        self.orthogonal_rotation = orthogonal_rotation
        width, bias = self.effective_codebook_dim, projection_has_bias
        self.has_projections = self.dim != width
        self.project_in = nn.Linear(self.dim, width, bias=bias) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(width, self.dim, bias=bias) if self.has_projections else nn.Identity()
        if orthogonal_rotation:
            if len(set(levels)) > 1:
                warnings.warn("FSQ: orthogonal_rotation mixes channels of different levels", stacklevel=2)
            rotation = nn.init.orthogonal_(torch.empty(self.codebook_dim, self.codebook_dim))
            self.register_buffer("orthogonal_rot", rotation)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Which upstream's up to 1.10 kept.
        constants = {
            "_levels": lambda: self._levels,
            "_basis": lambda: self._basis,
            "implicit_codebook": lambda: self.implicit_codebook,
        }
        error_msgs += drop_constants(state_dict, prefix, constants)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes, (K, d) float32, made when asked for: before rotation and projection."""
        return self._indices_to_codes(torch.arange(self.codebook_size, device=self._levels.device))

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """Codes of z, (..., d) -> (..., d), by the first formula."""
        levels, dtype = self._levels, torch.promote_types(z.dtype, torch.float32)
        half_range = (levels - 1).to(dtype) * (1 + eps) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).to(dtype)
        ratio = offset / half_range
        bounded = _bounded(z + ratio, True) if hard_clamp else _bounded(z + ratio.atanh(), False)
        bounded = bounded * half_range - offset
        return _StraightThrough.apply(bounded, False) / (levels // 2)

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """Codes of z, (..., d) -> (..., d), by the second formula."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        steps = (self._levels - 1).to(z.dtype)
        place = steps * (_bounded(z, hard_clamp) + 1) / 2 + 0.5
        return 2 / steps * _StraightThrough.apply(place, True) - 1

    def quantize(self, z: Tensor) -> Tensor:
        """Codes of z, (..., d) -> (..., d), in [-1, 1]."""
        bound = self.symmetry_preserving_bound if self.preserve_symmetry else self.bound
        return bound(z, hard_clamp=self.bound_hard_clamp)

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """In training, add noise to each element with probability `noise_dropout`."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        noisy = torch.empty_like(bounded_z).bernoulli_(self.noise_dropout).bool()
        noise = torch.rand_like(bounded_z) - 0.5
        return torch.where(noisy, bounded_z + noise, bounded_z).clamp(-1, 1)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each channel, (...) -> (..., d), whole numbers in [0, L_i)."""
        return indices_to_digits(indices, self._levels, self._basis)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Indices of codes, (..., d) -> (...), int32 (int64 beyond 2^31 codes); 0 for a code with a NaN."""
        require(
            self,
            zhat.ndim > 0 and zhat.shape[-1] == self.codebook_dim,
            f"codes are {tuple(zhat.shape)}, expected (..., {self.codebook_dim})",
        )
        zhat = zhat.detach().to(torch.promote_types(zhat.dtype, torch.float32))
        if self.preserve_symmetry:
            levels = (zhat + 1) / 2 * (self._levels - 1)
        else:
            levels = (zhat + 1) * (self._levels // 2)
        return digits_to_indices(levels.round(), self._basis, self.codebook_size)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices in eval mode, laid out as its input.

        Args:
            indices: (B, N), or (B, ...) with two axes or more between for images; an axis of c last where
                `keep_num_codebooks_dim`. With `channel_first`, N may be any number of axes.

        Returns:
            (B, N, D), or (B, D, ...) for images and with `channel_first`.
        """
        check_indices(self, indices, self.codebook_size)
        is_image = indices.ndim >= 3 + int(self.keep_num_codebooks_dim)
        codes = self.rotate_back(self._indices_to_codes(indices))
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        if isinstance(self.project_out, nn.Linear):
            codes = self.project_out(codes.to(self.project_out.weight.dtype))
        return codes.movedim(-1, 1) if is_image or self.channel_first else codes

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantize.

        Args:
            z: (B, N, D) or (B, D); (B, D, ...) with `channel_first` and wherever it has 4 axes or more.

        Returns:
            quantized: shaped as z.
            indices: int32 (int64 beyond 2^31 codes), the shape of z without its channels, then c where
                `keep_num_codebooks_dim`; None without `return_indices`. A vector with a NaN has index 0, and is NaN in
                `quantized`.

        Raises:
            ValueError: z has another shape.
            TypeError: z is not floating point.
        """
        channel_dim = 1 if z.ndim >= 4 or self.channel_first else -1
        expected = f"(B, {self.dim}, ...)" if channel_dim == 1 else f"(B, N, {self.dim}) or (B, {self.dim})"
        fits = z.ndim >= 2 and z.shape[channel_dim] == self.dim
        require(self, fits, f"z is {tuple(z.shape)}, expected {expected}")
        check_floating(self, "z", z)
        z = self.project_in(z.movedim(channel_dim, -1))
        codes, indices = self.quantize_channels(z.unflatten(-1, (self.num_codebooks, self.codebook_dim)))
        out = self.project_out(codes.flatten(-2)).movedim(-1, channel_dim)
        if indices is not None and not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        return out, indices

    def quantize_channels(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes, (..., d) of the dtype of z, and indices (...), of projected vectors (..., d)."""
        dtype = z.dtype
        autocast = torch.is_autocast_enabled(z.device.type) and not self.force_quantization_f32
        with torch.autocast(z.device.type, enabled=autocast):
            if self.force_quantization_f32 and dtype not in self.allowed_dtypes:
                z = z.to(torch.float32)
            if self.orthogonal_rotation:
                z = z @ self.orthogonal_rot.to(z.dtype)
            codes = self.quantize(z)
            indices = self.codes_to_indices(codes) if self.return_indices else None
            codes = self.rotate_back(self.maybe_apply_noise(codes))
        return codes.to(dtype), indices

    def rotate_back(self, codes: Tensor) -> Tensor:
        """Codes (..., d) in the channels that the rotation came from; as they are without one."""
        return codes @ self.orthogonal_rot.to(codes.dtype).T if self.orthogonal_rotation else codes

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        levels = self.indices_to_level_indices(indices)
        if self.preserve_symmetry:
            return levels * (2 / (self._levels - 1)) - 1
        half_width = self._levels // 2
        return (levels - half_width) / half_width

    def extra_repr(self) -> str:
        return f"levels={self._levels.tolist()}, dim={self.dim}, num_codebooks={self.num_codebooks}"


def _bounded(z: Tensor, hard_clamp: bool) -> Tensor:
    return z.clamp(-1, 1) if hard_clamp else z.tanh()


class _StraightThrough(torch.autograd.Function):
    """round or floor with the gradient of the identity, exactly and in one pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, floor: bool) -> Tensor:
        return z.floor() if floor else z.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
