"""Latent quantization: every channel takes the nearest of a few values of its own, which are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import check_floating, require
from ferrovae.nn.quantizers.mixed_radix import check_indices, digits_to_indices, indices_to_digits, radix_buffers
from ferrovae.nn.quantizers.rank_sum import all_reduce_packed
from ferrovae.ops import code_sums, nearest_code


class LatentQuantize(nn.Module):
    """Disentanglement by latent quantization (Hsu et al., 2023, arXiv:2305.18378).

    Channel i has L_i values v_i, at first spread evenly over [-1/2, 1/2] with 0 among them, and becomes the nearest,

        k_i = argmin_k |z_i - v_i[k]|,   code_i = v_i[k_i],

    with the gradient of the identity to z. The index is the mixed-radix number of the k_i, the first channel the
    fastest. In training, with x the input and y the output,

        loss = w_q mean (sg(y) - x)^2 + w_c mean (sg(x) - y)^2,

    and the second term trains the values.

    Args:
        levels: L_1, ..., L_d; or one number for all of `codebook_dim` channels.
        dim: D, the channels of x. If it is not c d, linear layers project to c d and back.
        commitment_loss_weight: w_c; None is 0.
        quantization_loss_weight: w_q; None is 0.
        num_codebooks: c, how many groups of d channels are quantized alike.
        codebook_dim: d; by default the length of `levels`.
        keep_num_codebooks_dim: indices keep an axis of c, as they do where c > 1.
        optimize_values: the values are parameters; otherwise they stay, outside the state_dict.
        in_place_codebook_optimizer: given the values, an optimizer; each training step moves them by it towards the
            mean of the z that took them, before the batch is quantized, and the loss does not train them.

    Raises:
        ValueError: a size is out of range, or `levels` and `codebook_dim` disagree.
        TypeError: a level is not an integer.
    """

    _levels: Tensor
    _basis: Tensor
    commitment_loss_weight: Tensor
    quantization_loss_weight: Tensor

    def __init__(
        self,
        levels: Sequence[int] | int,
        dim: int,
        commitment_loss_weight: float | None = 0.1,
        quantization_loss_weight: float | None = 0.1,
        num_codebooks: int = 1,
        codebook_dim: int = -1,
        keep_num_codebooks_dim: bool | None = None,
        optimize_values: bool | None = True,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(levels, int):
            require(self, codebook_dim > 0, f"codebook_dim is {codebook_dim}: one number of levels needs it")
            levels = [levels] * codebook_dim
        require(
            self,
            codebook_dim <= 0 or codebook_dim == len(levels),
            f"codebook_dim is {codebook_dim}, expected the {len(levels)} of levels",
        )
        require(self, dim >= 1, f"dim is {dim}, expected at least 1")
        require(self, num_codebooks >= 1, f"num_codebooks is {num_codebooks}, expected at least 1")
        require(
            self,
            in_place_codebook_optimizer is None or bool(optimize_values),
            "in_place_codebook_optimizer needs optimize_values=True",
        )
        radix_buffers(self, list(levels), least=1)
        for name, weight in (
            ("commitment_loss_weight", commitment_loss_weight),
            ("quantization_loss_weight", quantization_loss_weight),
        ):
            self.register_buffer(name, torch.tensor(weight or 0.0, dtype=torch.float32), persistent=False)
        self._commits, self._quantizes = bool(commitment_loss_weight), bool(quantization_loss_weight)
        self.dim = dim
        self.codebook_dim = len(levels)
        self.codebook_size = prod(levels)
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = bool(keep_num_codebooks_dim) or num_codebooks > 1
        self.optimize_values = bool(optimize_values)
        width = self.effective_codebook_dim
        self.has_projections = dim != width
        self.project_in = nn.Linear(dim, width) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(width, dim) if self.has_projections else nn.Identity()
        values = [_even_values(level) for level in levels]
        self.values_per_latent = (
            nn.ParameterList([nn.Parameter(value) for value in values]) if self.optimize_values else _Constants(values)
        )
        self.in_place_codebook_optimizer = (
            None if in_place_codebook_optimizer is None else in_place_codebook_optimizer(self.values_per_latent)
        )

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes, (K, d), made when asked for: before projection."""
        indices = torch.arange(self.codebook_size, device=self._levels.device)
        return self._codes(indices_to_digits(indices, self._levels, self._basis)).detach()

    def quantization_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """(sg(zhat) - z)^2, which trains z; `reduce`: mean, sum or none."""
        return _squared_error(self, zhat.detach(), z, reduce)

    def commitment_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """(sg(z) - zhat)^2, which trains zhat; `reduce`: mean, sum or none."""
        return _squared_error(self, z.detach(), zhat, reduce)

    def quantize(self, z: Tensor) -> Tensor:
        """The nearest values, with the gradient of the identity: (..., d) -> (..., d)."""
        return self._codes(self._nearest(z)).detach().to(z.dtype) + (z - z.detach())

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Indices of codes, (..., d) -> (...), int32 (int64 beyond 2^31 codes)."""
        require(
            self,
            zhat.ndim > 0 and zhat.shape[-1] == self.codebook_dim,
            f"codes are {tuple(zhat.shape)}, expected (..., {self.codebook_dim})",
        )
        return digits_to_indices(self._nearest(zhat), self._basis, self.codebook_size)

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Codes of indices, laid out as x: what `forward` gives for them in eval mode.

        Args:
            indices: (B, ...), with an axis of c last where `keep_num_codebooks_dim`.
            project_out: otherwise the c d channels before the projection.

        Returns:
            (B, D, ...), or (B, c d, ...).
        """
        check_indices(self, indices, self.codebook_size)
        codes = self._codes(indices_to_digits(indices, self._levels, self._basis))
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        if project_out and isinstance(self.project_out, nn.Linear):
            codes = self.project_out(codes.to(self.project_out.weight.dtype))
        return codes.movedim(-1, 1)

    def quantize_and_project(self, z: Tensor, is_img_or_video: bool, ps: Sequence[Sequence[int]]) -> Any:
        """Quantize projected tokens: z (B, N, c, d) whose N axis is a grid of shape ps[0].

        Returns codes (B, N, c d), the output (B, D, *grid), and indices (B, *grid), then c where kept.
        `is_img_or_video` has no effect: the grid says it.
        """
        digits = self._nearest(z)
        codes = self._codes(digits).detach().to(z.dtype) + (z - z.detach())
        indices = digits_to_indices(digits, self._basis, self.codebook_size)
        grid = tuple(ps[0])
        out = self.project_out(codes.flatten(-2))
        out = out.reshape(out.shape[0], *grid, self.dim).movedim(-1, 1)
        indices = indices.reshape(indices.shape[0], *grid, self.num_codebooks)
        return codes.flatten(-2), out, indices if self.keep_num_codebooks_dim else indices.squeeze(-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize.

        Args:
            z: (B, D, ...), floating point.

        Returns:
            quantized: shaped as z.
            indices: int32 (int64 beyond 2^31 codes), (B, ...), then c where `keep_num_codebooks_dim`. A NaN takes the
                first value.
            loss: [], float32 (float64 for a float64 z); 0 in eval mode and without rows.

        Raises:
            ValueError: z has another shape.
            TypeError: z is not floating point.
        """
        require(self, z.ndim >= 2 and z.shape[1] == self.dim, f"z is {tuple(z.shape)}, expected (B, {self.dim}, ...)")
        check_floating(self, "z", z)
        # the loss would be slow between two memory layouts
        tokens = z.movedim(1, -1).contiguous()
        projected = self.project_in(tokens)
        rows = projected.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        digits = self._nearest(rows)
        if self.in_place_codebook_optimizer is not None and self.training:
            self._optimize_values(rows.detach(), digits)
            digits = self._nearest(rows)
        values = self._codes(digits).to(rows.dtype)
        through = rows - rows.detach()
        out = self._output(values.detach() + through)
        indices = digits_to_indices(digits, self._basis, self.codebook_size)
        if not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        learns = self.optimize_values and self.in_place_codebook_optimizer is None
        trainable_out = self._output(values + through) if learns and self._commits and self.training else out
        return out.movedim(-1, 1), indices, self._loss(tokens, out, trainable_out)

    def _loss(self, z: Tensor, out: Tensor, trainable_out: Tensor) -> Tensor:
        z, out, trainable_out = (
            tensor.to(torch.promote_types(z.dtype, torch.float32)) for tensor in (z, out, trainable_out)
        )
        loss = z.new_zeros(())
        if self.training and self._commits:
            loss = loss + self.commitment_loss_weight * self.commitment_loss(z, trainable_out)
        if self.training and self._quantizes:
            loss = loss + self.quantization_loss_weight * self.quantization_loss(z, out)
        return loss

    def _output(self, codes: Tensor) -> Tensor:
        """(B, ..., c, d) -> (B, ..., D)."""
        return self.project_out(codes.flatten(-2))

    def _nearest(self, z: Tensor) -> Tensor:
        """The place of each element among the values of its channel: (..., d), int64."""
        return torch.stack(
            [
                nearest_code(channel[..., None].detach(), values[:, None].detach())
                for channel, values in zip(z.unbind(-1), self.values_per_latent, strict=True)
            ],
            dim=-1,
        )

    def _codes(self, digits: Tensor) -> Tensor:
        """The values at places (..., d)."""
        places = zip(digits.unbind(-1), self.values_per_latent, strict=True)
        return torch.stack([values[place] for place, values in places], dim=-1)

    @torch.no_grad()
    def _optimize_values(self, z: Tensor, digits: Tensor) -> None:
        """One step on mean (v[k] - z)^2 over the rows of all ranks; its gradient is 2 (count v - sum) / size."""
        parts: list[Tensor] = [torch.tensor([float(z.numel())], device=z.device)]
        for channel, places, values in zip(z.unbind(-1), digits.unbind(-1), self.values_per_latent, strict=True):
            parts += code_sums(channel.reshape(-1, 1), places.reshape(-1), values.shape[0])
        size, *parts = all_reduce_packed(parts)
        for values, sums, counts in zip(self.values_per_latent, parts[::2], parts[1::2], strict=True):
            values.grad = (2 * (counts * values - sums[:, 0]) / size.clamp(min=1)).to(values.dtype)
        optimizer = self.in_place_codebook_optimizer
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    def extra_repr(self) -> str:
        return f"levels={self._levels.tolist()}, dim={self.dim}, num_codebooks={self.num_codebooks}"


class _Constants(nn.Module):
    """Tensors that move with the layer but are no part of its state."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_buffer(str(number), tensor, persistent=False)

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, number: int) -> Tensor:
        return self.get_buffer(str(range(len(self))[number]))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.buffers())


def _squared_error(layer: LatentQuantize, target: Tensor, x: Tensor, reduce: str) -> Tensor:
    # not mse_loss: compiled, its gradient is taken to have another memory layout than it has
    require(layer, reduce in ("mean", "sum", "none"), f"reduce is {reduce!r}, expected mean, sum or none")
    error = x - target
    error = error * error
    if reduce == "mean":
        return error.sum() / max(error.numel(), 1)
    return error.sum() if reduce == "sum" else error


def _even_values(level: int) -> Tensor:
    """Evenly spread from -1/2, with 0 among them (of a single value: only -1/2)."""
    return torch.linspace(-0.5, 0.5, level) if level % 2 == 1 else torch.arange(level) / level - 0.5
