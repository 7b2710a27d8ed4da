"""Hierarchical vector quantization: a feature map as codes on grids from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import check_floating, require
from ferrovae.nn.quantizers.keyed_sampling import keyed_words
from ferrovae.nn.quantizers.layout import visible_tokens
from ferrovae.nn.quantizers.quantizer_dropout import QuantizerDropout
from ferrovae.nn.quantizers.rank_sum import RankSum
from ferrovae.nn.quantizers.resolution_levels import ResidualConvolution, level_shape, pool_to, resize
from ferrovae.nn.quantizers.stack_update import ResidualStage, StageUpdate, apply_updates
from ferrovae.nn.quantizers.usage import CodebookUsage


class HierarchicalVQ(QuantizerDropout):
    """L levels of `VectorQuantize` over ever finer grids (VAR, Tian et al., 2024, arXiv:2404.02905, algorithm 1).

    With r_1 = x: q_l = phi_l(up(quantize_l(down_l(r_l)))), r_{l+1} = r_l - q_l, reconstruction = sum_l q_l. down is the
    mean over the cells of the level's grid, up linear interpolation, phi a convolution that is mixed with the identity.

    Arguments, results and `state_dict` are those of `vector_quantize_pytorch.HierarchicalVQ` 1.32.

    Args:
        dim: C, the channels of x.
        codebook_size: K, or one for each level.
        scales: the sizes of the levels' grids, each an int or one for each axis; none smaller than the one before.
        shared_codebook: one codebook for all levels.
        channel_first: x is (B, C, N), otherwise (B, N, C).
        accept_image_fmap, accept_3d_fmap: the grid is (H, W), or (depth, H, W), instead of (N).
        sync_codebook, decay, commitment_weight, rotation_trick, kmeans_init, kmeans_iters, threshold_ema_dead_code,
            stochastic_sample_codes, sample_codebook_temp, orthogonal_reg_weight, orthogonal_reg_max_codes,
            orthogonal_reg_active_codes_only: of each level's `VectorQuantize`.
        quant_resi: the share of the convolution in phi.
        share_quant_resi: 1: one phi for all levels; n > 1: n of them, spread over the levels; 0: one each.
        nested_dropout: the probability that a training step reconstructs from the first levels only, uniformly from
            `nested_dropout_min_levels` to L - 1 of them; their mean loss is then that of the levels kept.
        sync_timeout: seconds to wait for the statistics of other ranks before saying who is missing.

    Raises:
        ValueError: sizes or options do not fit together.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        scales: Sequence[int | Sequence[int]],
        shared_codebook: bool = True,
        channel_first: bool = True,
        sync_codebook: bool | None = None,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        rotation_trick: bool = False,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 0.1,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_max_codes: int | None = 128,
        orthogonal_reg_active_codes_only: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        nested_dropout: float = 0.0,
        nested_dropout_min_levels: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        sync_timeout: float = 60.0,
    ) -> None:
        name = type(self).__name__
        require(name, not (accept_image_fmap and accept_3d_fmap), "accept_image_fmap=True excludes accept_3d_fmap=True")
        axes = 2 if accept_image_fmap else 3 if accept_3d_fmap else 1
        shapes = tuple(level_shape(name, scale, axes) for scale in scales)
        require(name, len(shapes) > 0, "scales is empty, expected at least one")
        for before, after in pairwise(shapes):
            require(
                name,
                all(a <= b for a, b in zip(before, after, strict=True)),
                f"scales {before} and {after}: expected none smaller than the one before",
            )
        sizes = (codebook_size,) * len(shapes) if isinstance(codebook_size, int) else tuple(codebook_size)
        require(name, len(sizes) == len(shapes), f"codebook_size has {len(sizes)} sizes for {len(shapes)} levels")
        require(name, not shared_codebook or len(set(sizes)) == 1, f"shared_codebook=True needs one size, not {sizes}")
        require(name, 0 <= nested_dropout <= 1, f"nested_dropout is {nested_dropout}, expected a number from 0 to 1")
        require(
            name,
            nested_dropout_min_levels >= 1,
            f"nested_dropout_min_levels is {nested_dropout_min_levels}, expected at least 1",
        )
        super().__init__(
            len(shapes),
            quantize_dropout=False,
            quantize_dropout_cutoff_index=0,
            quantize_dropout_multiple_of=1,
            quantize_dropout_per_sample=False,
        )
        self.dim = dim
        self.spatial_dims = axes
        self.channel_first = channel_first
        self.scales = tuple(scales)
        self.level_shapes = shapes
        self.num_levels = len(shapes)
        self.codebook_sizes = sizes
        self.nested_dropout = nested_dropout
        self.nested_dropout_min_levels = nested_dropout_min_levels
        options: dict[str, Any] = {
            "decay": decay,
            "commitment_weight": commitment_weight,
            "rotation_trick": rotation_trick,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "stochastic_sample_codes": stochastic_sample_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "orthogonal_reg_weight": orthogonal_reg_weight,
            "orthogonal_reg_max_codes": orthogonal_reg_max_codes,
            "orthogonal_reg_active_codes_only": orthogonal_reg_active_codes_only,
            "sync_codebook": sync_codebook,
            "sync_timeout": sync_timeout,
        }
        self.vq = ResidualStage(dim, sizes[0], **options) if shared_codebook else None
        self.vqs = None if shared_codebook else nn.ModuleList([ResidualStage(dim, size, **options) for size in sizes])
        self.phi_shared: ResidualConvolution | None = None
        self.phi_levels: nn.ModuleList | None = None
        if share_quant_resi == 1:
            self.phi_shared = ResidualConvolution(dim, axes, quant_resi)
        else:
            count = self.num_levels if share_quant_resi <= 0 else min(self.num_levels, int(share_quant_resi))
            self.phi_levels = nn.ModuleList([ResidualConvolution(dim, axes, quant_resi) for _ in range(count)])
        self._sum_over_ranks = RankSum(f"{name}(dim={dim}, levels={self.num_levels})", sync_timeout)

    def get_vq(self, level_index: int) -> ResidualStage:
        """The level's quantizer."""
        return self.vq if self.vq is not None else cast("ResidualStage", cast("nn.ModuleList", self.vqs)[level_index])

    def pool_residual(
        self, t: Tensor, level_shape: Sequence[int], mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Means of t (B, C, *grid) over the cells of a level, of the positions that mask (B, *grid) shows.

        Returns (B, C, *level_shape), and which cells have a visible position, (B, *level_shape) bool, or None.
        """
        return pool_to(t, level_shape, mask)

    def choose_phi(self, level_index: int) -> ResidualConvolution:
        """The level's convolution."""
        if self.phi_shared is not None:
            return self.phi_shared
        phis = cast("nn.ModuleList", self.phi_levels)
        position = level_index / max(self.num_levels - 1, 1)
        return cast("ResidualConvolution", phis[round(position * (len(phis) - 1))])

    def upsample_to_full(self, q: Tensor, full_shape: Sequence[int], level_index: int) -> Tensor:
        """Codes of a level, (B, C, *level_shape), on the full grid: interpolated, then phi."""
        found: Tensor = self.choose_phi(level_index)(resize(q, full_shape))
        return found

    def dropout_state(self) -> Tensor | None:
        """The moving counts of the first level."""
        book = self.get_vq(0)._codebook
        return book.cluster_size if book.wants_statistics() else None

    def sample_nested_cutoff(self, device: torch.device | str | None) -> Tensor | None:
        """The last level to keep in this step, int64 []; None where none is ever dropped."""
        least, levels = self.nested_dropout_min_levels, self.num_levels
        if not self.training or self.nested_dropout <= 0 or least >= levels:
            return None
        seed = self.dropout_seed(device)
        words = keyed_words(seed, torch.arange(2, device=seed.device), 0)
        drops = words[0] < int(self.nested_dropout * 2**32)
        return torch.where(drops, least - 1 + words[1] % (levels - least), levels - 1)

    def usage(self, threshold: float | None = None) -> tuple[CodebookUsage, ...]:
        """How each level's codes are used, see `VectorQuantize.usage`; one report where they share a codebook."""
        levels = 1 if self.vq is not None else self.num_levels
        return tuple(self.get_vq(level).usage(threshold=threshold) for level in range(levels))

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | Tensor | None = None,
        return_cutoff: bool = False,
    ) -> tuple[Any, ...]:
        """Quantize level by level; in training the codebooks follow the batch, a shared one after every level.

        Args:
            x: (B, C, *grid), or (B, *grid, C) without `channel_first`; floating point.
            indices: not supported; `get_output_from_indices` decodes.
            mask: bool (B, *grid); False marks padding, which takes no part in anything.
            lens: int64 (B,), the lengths of the sequences, instead of a mask.
            sample_codebook_temp: overrides the layer's own for this call.
            return_cutoff: also return the last level kept by nested dropout, or None if all are.

        Returns:
            reconstruction: shape of x, 0 where masked.
            indices: for each level int64 (B, *level_shape), -1 in cells without a visible position.
            loss: scalar, the mean of the levels' losses.

        Raises:
            ValueError: x, mask or lens have another shape, or indices are given.
            TypeError: x is not floating point, or mask not bool.
        """
        require(self, indices is None, "indices are given: get_output_from_indices decodes them")
        expected = f"(B, {self.dim}, ...)" if self.channel_first else f"(B, ..., {self.dim})"
        axis = 1 if self.channel_first else -1
        require(
            self,
            x.ndim == self.spatial_dims + 2 and x.shape[axis] == self.dim,
            f"x is {tuple(x.shape)}, expected {expected} with {self.spatial_dims} axes of positions",
        )
        check_floating(self, "x", x)
        require(self, lens is None or self.spatial_dims == 1, "lens is of sequences, not of maps: pass mask")
        tokens = x.movedim(axis, -1)
        visible = visible_tokens(type(self).__name__, tokens, mask, lens)
        full = tokens.movedim(-1, 1)
        residual = full if visible is None else torch.where(visible[:, None], full, 0.0)
        cutoff = self.sample_nested_cutoff(x.device)
        total, found, losses = torch.zeros_like(residual), [], []
        updates: list[StageUpdate] = []
        for level in range(self.num_levels):
            quantized, level_indices, loss = self._level(level, residual, visible, sample_codebook_temp, updates)
            residual = residual - quantized
            total = total + (quantized if cutoff is None else torch.where(cutoff >= level, quantized, 0.0))
            found.append(level_indices)
            losses.append(loss)
        apply_updates(updates, self._sum_over_ranks)
        loss = torch.stack(losses)
        if cutoff is None:
            loss = loss.mean()
        else:
            kept = torch.arange(self.num_levels, device=x.device) <= cutoff
            loss = torch.where(kept, loss, 0.0).sum() / kept.sum()
        if visible is not None:
            total = torch.where(visible[:, None], total, 0.0)
        outputs = (total.movedim(1, axis), tuple(found), loss)
        return (*outputs, self._reported(cutoff)) if return_cutoff else outputs

    def get_output_from_indices(
        self, indices: Sequence[Tensor], full_shape: int | Sequence[int] | None = None
    ) -> Tensor:
        """The reconstruction of every level's indices (B, *level_shape), on the last level's grid or `full_shape`.

        -1 is a zero code. Laid out as x.
        """
        require(
            self,
            isinstance(indices, tuple | list) and len(indices) == self.num_levels,
            f"indices expected as {self.num_levels} tensors, one for each level",
        )
        shape = self.level_shapes[-1] if full_shape is None else level_shape(self, full_shape, self.spatial_dims)
        total: Tensor | None = None
        for level, (index, due) in enumerate(zip(indices, self.level_shapes, strict=True)):
            require(
                self,
                tuple(index.shape[1:]) == due,
                f"indices of level {level} are {tuple(index.shape)}, expected (B, {', '.join(map(str, due))})",
            )
            codes = self.get_vq(level).get_output_from_indices(index.flatten(1)).mT.unflatten(2, due)
            found = self.upsample_to_full(codes.to(self.choose_phi(level).conv.weight.dtype), shape, level)
            total = found if total is None else total + found
        assert total is not None
        return total if self.channel_first else total.movedim(1, -1)

    def _level(
        self,
        level: int,
        residual: Tensor,
        visible: Tensor | None,
        temperature: float | Tensor | None,
        updates: list[StageUpdate],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One level of the residual (B, C, *grid): its part of the sum, its indices and its loss.

        Levels with codebooks of their own leave their training steps in `updates`; a shared codebook takes its own at
        once, for the next level to see.
        """
        shape, stage = self.level_shapes[level], self.get_vq(level)
        pooled, held = self.pool_residual(residual, shape, visible)
        # If shared, one all-reduce a level: the next is looked up with codes that hold all ranks' rows of this one.
        stage.updates = None if self.vq is not None else updates
        try:
            codes, indices, loss = stage(
                pooled.flatten(2).mT,
                mask=None if held is None else held.flatten(1),
                sample_codebook_temp=temperature,
            )
        finally:
            stage.updates = None
        grid = cast("list[int]", list(residual.shape[2:]))
        quantized = self.upsample_to_full(codes.mT.unflatten(2, shape), grid, level)
        assert indices.shape[-1] == math.prod(shape)
        return quantized, indices.unflatten(1, shape), loss

    def _reported(self, cutoff: Tensor | None) -> int | Tensor | None:
        """As a number, but in a compiled graph, which cannot know it; None where all levels are kept."""
        if cutoff is None or torch.compiler.is_compiling():
            return cutoff
        return None if int(cutoff) == self.num_levels - 1 else int(cutoff)
