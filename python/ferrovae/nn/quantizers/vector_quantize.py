"""Vector quantization: each vector is replaced by the nearest vector of a codebook."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ferrovae.nn.quantizers.affine_codebook import AffineCodebook, AffineOptions
from ferrovae.nn.quantizers.checks import require
from ferrovae.nn.quantizers.codebook import Codebook, CodebookOptions, EmaWeight, take_codes
from ferrovae.nn.quantizers.in_place_optimizer import OptimizerFactory, take_step
from ferrovae.nn.quantizers.layout import Heads, Layout, visible_tokens
from ferrovae.nn.quantizers.older_state import give_codebook_its_own
from ferrovae.nn.quantizers.quantization_step import LossBreakdown, QuantizationStep, StepOptions
from ferrovae.nn.quantizers.rank_sum import RankSum
from ferrovae.nn.quantizers.usage import CodebookUsage, counts_of_indices, usage_of_counts
from ferrovae.nn.quantizers.vector_quantize_options import check_options


class VectorQuantize(nn.Module):
    """The nearest of K codes for every vector, as in VQ-VAE (van den Oord et al., 2017, arXiv:1711.00937).

    Arguments, results and `state_dict` are those of `vector_quantize_pytorch.VectorQuantize` 1.32, so either loads the
    other's checkpoints; those of older versions load too, or the error names the key that does not. The lookup is exact
    and holds no N x K matrix. Under `torch.distributed` every step sums the codebook statistics over the ranks in one
    all-reduce, whenever the process group was made; all ranks must train together, and hold the same codebook to the
    bit.

    Args:
        dim: channels of the input.
        codebook_size: K, the number of codes.
        codebook_dim: D, dimensions of a code; where heads x D is not `dim`, linear maps `project_in` and `project_out`
            go between.
        heads: vectors that an input vector is cut into, each with a code of its own.
        separate_codebook_per_head: a codebook for each head instead of one for all.
        decay: of the moving averages that the codes are made of: new = decay * old + (1 - decay) * batch.
        eps: Laplace smoothing of the moving counts.
        freeze_codebook: leave the codebook as it is in training; `forward` can say otherwise for one call.
        kmeans_init: take the codes from k-means over the first batch, `kmeans_iters` steps, also in eval mode; a
            cluster that attracts no vector becomes the zero code.
        sync_kmeans: over the rows of all ranks; otherwise each rank starts from its own.
        use_cosine_sim: inputs and codes have length 1, and the nearest is the one at the smallest angle.
        layernorm_after_project_in: a LayerNorm behind `project_in`.
        threshold_ema_dead_code: a code whose moving count falls under it is replaced by a vector of the batch; 0 never
            replaces. Only in training.
        channel_last: x is (B, N, dim); otherwise (B, dim, N).
        accept_image_fmap, accept_3d_fmap: x is (B, dim, H, W), or (B, dim, depth, H, W).
        commitment_weight: of the mean squared distance between the vectors and their codes in the loss.
        commitment_use_cross_entropy_loss: take the cross-entropy of softmax(-distance) at the chosen codes instead.
        orthogonal_reg_weight: of the mean squared cosine between codes (Shin et al., arXiv:2112.00384); makes the codes
            a parameter. `orthogonal_reg_active_codes_only`: of those that the batch uses;
            `orthogonal_reg_max_codes`: of a random choice of at most so many.
        codebook_diversity_loss_weight: of minus the entropy of the mean of softmax(-temperature * distance) at each
            position, with `codebook_diversity_temperature`.
        stochastic_sample_codes: in training draw the code from softmax(-distance / `sample_codebook_temp`).
        straight_through: needs `rotation_trick=False`. Where the input gets no gradient but `project_in` does, give it
            that of the expected code under softmax(-distance / `sample_codebook_temp`).
        rotation_trick: pass gradients to the input rotated and scaled as the code lies to the vector; by default where
            `dim > 1`. False passes them unchanged.
        directional_reparam: go from the vector towards the code, with noise of `directional_reparam_variance` in the
            direction (DiVeQ), which trains codes and encoder alike; no commitment loss.
        sync_codebook: False leaves each rank its own statistics. None and True sum them over the ranks, if any.
        sync_affine_param: also the batch moments of `affine_param`.
        ema_update: the codes follow the moving averages. Default: True, unless the codes are learnt.
        vq_bridge: a module from the codes (H, K, D) to those in use, which the loss trains through (FVQ).
        manual_ema_update: keep the moving averages, but leave the codes to a call of `_codebook.update_ema()`.
        learnable_codebook: the codes are a parameter, which the loss trains. Default: True with `directional_reparam`
            or `vq_bridge`.
        in_place_codebook_optimizer: from parameters to an optimizer that takes a step on the codes in every forward
            pass. `manual_in_place_optimizer_update` leaves the step to a call of `update_in_place_optimizer`, without
            which torch's optimizers break a compiled graph in two.
        affine_param: move the codes as the batch's mean and variance move: moving averages with
            `affine_param_batch_decay` of the batch, and with `affine_param_codebook_decay` of the codes.
        sync_update_v: multiplies the gradients through the code by 1 + v (Huh et al., 2023, eq. 21).
        return_zeros_for_masked_padding: masked vectors come out as zeros, otherwise as they came in.
        route_gradients_to_input: False gives the input no gradient from the quantized vectors.
        sync_timeout: seconds to wait for the statistics of other ranks before saying who is missing.

    Raises:
        ValueError: a size, rate or weight is out of range, or two arguments exclude each other.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: OptimizerFactory | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        *,
        sync_timeout: float = 60.0,
    ) -> None:
        codebook_dim = dim if codebook_dim is None else codebook_dim
        learnt = directional_reparam or vq_bridge is not None
        ema_update = not learnt if ema_update is None else bool(ema_update)
        learnable_codebook = learnt if learnable_codebook is None else bool(learnable_codebook)
        rotation_trick = not directional_reparam and dim > 1 if rotation_trick is None else rotation_trick
        check_options(type(self).__name__, dict(locals()))
        super().__init__()
        self.dim = dim
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.learnable_codebook = learnable_codebook
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self._heads = Heads(heads, separate_codebook_per_head)
        self._layout = Layout(dim, channel_last, accept_image_fmap, accept_3d_fmap)
        self._step_options = StepOptions(
            cosine=use_cosine_sim,
            commitment_weight=0.0 if directional_reparam else commitment_weight,
            commitment_cross_entropy=commitment_use_cross_entropy_loss,
            orthogonal_weight=orthogonal_reg_weight,
            orthogonal_active_only=orthogonal_reg_active_codes_only,
            orthogonal_most=orthogonal_reg_max_codes,
            diversity_weight=codebook_diversity_loss_weight,
            diversity_temperature=codebook_diversity_temperature,
            stochastic=stochastic_sample_codes,
            temperature=sample_codebook_temp,
            soft=straight_through,
            rotate=rotation_trick,
            direct=directional_reparam,
            direct_variance=directional_reparam_variance,
            learnable=learnable_codebook,
            sync_update=sync_update_v,
            route=route_gradients_to_input,
        )
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            project = nn.Linear(dim, inner)
            self.project_in = nn.Sequential(project, nn.LayerNorm(inner)) if layernorm_after_project_in else project
            self.project_out = nn.Linear(inner, dim)
        options = CodebookOptions(
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            sync_codebook=sync_codebook,
            use_cosine_sim=use_cosine_sim,
            threshold_ema_dead_code=threshold_ema_dead_code,
            learnable_codebook=learnable_codebook or orthogonal_reg_weight > 0,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
        )
        books = heads if separate_codebook_per_head else 1
        self._codebook: Codebook
        if affine_param:
            affine = AffineOptions(affine_param_batch_decay, affine_param_codebook_decay, sync_affine_param)
            self._codebook = AffineCodebook(codebook_dim, codebook_size, books, options, vq_bridge, affine=affine)
        else:
            self._codebook = Codebook(codebook_dim, codebook_size, books, options, vq_bridge)
        self.in_place_codebook_optimizer = (
            None if in_place_codebook_optimizer is None else in_place_codebook_optimizer(self._codebook.parameters())
        )
        self._sum_over_ranks = RankSum(f"{type(self).__name__}(dim={dim}, codebook_size={codebook_size})", sync_timeout)

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow their moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, D) float32, or (heads, K, D) where each head has its own; assigning copies into them."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self.codebook.copy_(codes)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes in use of indices (B, ...), with a last axis of heads if there are several; -1 gives 0.

        Laid out as the layer's input, but with heads x D channels. `ValueError` for an index that no code has.
        """
        return self._layout.from_channel_last(self._codes_of(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices in eval mode, laid out as the layer's input; -1 is a zero code."""
        dtype = self.project_out.weight.dtype if isinstance(self.project_out, nn.Linear) else torch.float32
        return self._layout.from_channel_last(self.project_out(self._codes_of(indices).to(dtype)))

    def usage(self, indices: Tensor | None = None, threshold: float | None = None) -> CodebookUsage:
        """How the codes are used: how many are active, perplexity, entropy in nats, the dead ones, and their age.

        Of the moving counts, which are those of all ranks. A codebook that keeps none (`ema_update=False`, no dead
        codes replaced) needs `indices`, as `forward` gives them: then of these, summed over the ranks, which must all
        call. Age is counted since the layer was made or loaded.

        threshold: a count under which a code is dead; default `threshold_ema_dead_code`, or else a hundredth of the
            mean count.
        """
        book = self._codebook
        if indices is None:
            require(self, book.wants_statistics(), "usage() of a codebook that keeps no counts: pass indices")
            counts = book.cluster_size
        else:
            rows = self._heads.split_values(indices)
            counts = counts_of_indices(rows, self.codebook_size, synchronized=book.synchronized)
        if threshold is None:
            threshold = book.options.threshold_ema_dead_code or float(counts.mean()) / 100
        return usage_of_counts(counts, book.age, threshold)

    def maybe_split_heads_from_input(self, x: Tensor) -> Tensor:
        """(B, N, heads D) -> (heads, B, N, D) with separate codebooks, (1, B heads, N, D) with one; one head: x."""
        if self.heads == 1:
            return x
        parts = x.unflatten(-1, (self.heads, -1))
        return parts.movedim(2, 0) if self.separate_codebook_per_head else parts.transpose(1, 2).flatten(0, 1)[None]

    def expire_codes_(self, x: Tensor) -> None:
        """In training, replace the dead codes by rows of x (B, N, heads D), which `project_in` has seen."""
        self._codebook.expire_codes_(self._rows(x))

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Take the codebook's training step as if `forward` had given these indices; -1 counts nothing."""
        tokens = self._layout.to_channel_last(self, x)
        visible = visible_tokens(type(self).__name__, tokens, mask, None)
        rows = self._rows(self.project_in(tokens).to(torch.float32))
        seen = None if visible is None else self._heads.split_mask(visible)
        self._update(rows, self._heads.split_values(indices), seen)

    def update_ema_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """The older name of `update_indices`."""
        self.update_indices(x, indices, mask)

    def update_in_place_optimizer(self) -> None:
        """Let the codebook's own optimizer take its step."""
        if self.in_place_codebook_optimizer is not None:
            ranks = self._sum_over_ranks if self._codebook.synchronized else None
            take_step(self.in_place_codebook_optimizer, self._codebook.parameters(), ranks)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | Tensor | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: EmaWeight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LossBreakdown]:
        """Quantize, and in training let the codebook follow the batch afterwards.

        Args:
            x: (B, dim), (B, N, dim), or as `channel_last` and the feature maps say; floating point.
            indices: int64, as the layer returns them: return the cross-entropy of softmax(-distance) at these codes.
            mask: bool (B, N), or as the indices; False marks padding, which takes no part in anything.
            lens: int64 (B,), the lengths of the sequences, instead of a mask.
            topk: give the k nearest codes of every vector; the codebook stays as it is.
            sample_codebook_temp, freeze_codebook, ema_update: override the layer's own for this call.
            return_loss_breakdown: return a `LossBreakdown` as the fourth value.
            codebook_transform_fn: from codes (H, K, D) to those of every vector, (H, B, N, K, D); see
                `token_codebooks.RowwiseTransform` for one that is evaluated in parts.
            ema_update_weight: of this call in the moving averages, by code, (K,) or (H, K), or a function that gives it
                for sums and counts.
            accum_ema_update: only keep the batch's statistics for the next call without it.

        Returns:
            quantized: shape and dtype of x. In eval mode exactly the codes, without a gradient to x.
            indices: int64, the shape of x without its channels, and an axis of heads if there are several; -1 where
                masked. A vector with a NaN or an infinity has index 0 and never enters the codebook.
            loss: scalar, float32 (float64 for a float64 x): the weighted sum of the terms, of the codes as they were
                before this step; 0 in eval mode and where everything is masked.

            With `topk`, quantized and indices end in an axis of k, and so does the loss, one for every code, also in
            eval mode. With `indices`, only quantized and the cross-entropy in nats, 0 where all indices are -1.

        Raises:
            ValueError: x, mask, lens or indices have another shape, or an option cannot be combined with topk or
                a transform.
            TypeError: x is not floating point, or mask not bool.
        """
        tokens = self._layout.to_channel_last(self, x)
        visible = visible_tokens(type(self).__name__, tokens, mask, lens)
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        topk = self._checked_topk(topk, codebook_transform_fn)
        clean = tokens if visible is None else torch.where(visible[..., None], tokens, 0.0)
        projected = self.project_in(clean)
        grid = tokens.shape[:-1]
        with torch.autocast(x.device.type, enabled=False):
            rows = self._rows(projected.to(torch.promote_types(x.dtype, torch.float32)))
            step = QuantizationStep(
                self._codebook,
                self._step_options,
                rows,
                mask=None if visible is None else self._heads.split_mask(visible),
                positions=math.prod(grid[1:]),
                shared_heads=1 if self.separate_codebook_per_head else self.heads,
                topk=topk,
                temperature=sample_codebook_temp,
                freeze=freeze,
                transform=codebook_transform_fn,
                training=self.training,
                keeps_scores=indices is not None,
            )
            step.look_up()
            optimizes = self.training and not freeze and self.in_place_codebook_optimizer is not None
            if optimizes:
                # At the codes looked up, before the codebook's own step moves them.
                step.accumulate_in_place_gradients()
            if self.training and not freeze and topk is None:
                self._update(step.exact, step.indices, step.mask, ema_update_weight, accum_ema_update, ema_update)
            if optimizes:
                if not self.manual_in_place_optimizer_update:
                    self.update_in_place_optimizer()
                step.look_up()
            vectors = step.vectors_with_gradient(x.requires_grad)
            targets = None if indices is None else self._targets(indices, grid)
            if targets is not None:
                loss = step.cross_entropy(targets)
                breakdown = None
            else:
                loss, breakdown = step.loss()
        quantized = self._finished(self._heads.merge(vectors, grid).to(x.dtype), tokens, visible, topk)
        quantized = self._layout.from_channel_last(quantized, single=x.ndim == 2)
        if breakdown is None:
            return quantized, loss
        found = self._heads.merge_values(step.indices, grid)
        if visible is not None:
            found = torch.where(visible.reshape(*grid, *(1 for _ in found.shape[len(grid) :])), found, -1)
        if loss.ndim:
            loss = loss.reshape(found.shape)
        if breakdown.commitment.ndim:  # of the k nearest codes, as the tokens are: (B, N, k)
            by_token = breakdown.commitment.reshape(grid[0], math.prod(grid[1:]), -1)
            breakdown = breakdown._replace(commitment=by_token)
        return (quantized, found, loss, breakdown) if return_loss_breakdown else (quantized, found, loss)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        give_codebook_its_own(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _rows(self, projected: Tensor) -> Tensor:
        """(B, ..., heads D) -> rows (H, N, D), of length 1 with cosine similarity."""
        rows = self._heads.split(projected)
        return normalize(rows, dim=-1, eps=1e-6) if self.use_cosine_sim else rows

    def _update(
        self,
        rows: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        weight: EmaWeight | None = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """The codebook's training step: this rank's statistics, their sum over the ranks, moving averages."""
        book = self._codebook
        if not book.wants_statistics(ema_update):
            return
        statistics = book.local_statistics(rows, indices, mask)
        if book.synchronized:
            statistics = statistics.with_parts(self._sum_over_ranks(statistics.parts()))
        book.apply_statistics(statistics, weight=weight, accumulate=accumulate, ema_update=ema_update)

    def _finished(self, quantized: Tensor, tokens: Tensor, visible: Tensor | None, topk: int | None) -> Tensor:
        """What comes out for (B, ..., heads D): projected, and with padding as asked for."""
        quantized = self.project_out(quantized)
        if visible is None:
            return quantized
        padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
        if topk is not None:
            padding, visible = padding.unsqueeze(-2), visible.unsqueeze(-1)
        return torch.where(visible[..., None], quantized, padding)

    def _checked_topk(self, topk: int | None, transform: object) -> int | None:
        require(
            self,
            transform is None or self.heads == 1 or self.separate_codebook_per_head,
            "codebook_transform_fn excludes heads that share a codebook",
        )
        if topk is None:
            return None
        require(self, int(topk) >= 1, f"topk is {topk}, expected at least 1")
        require(self, self.heads == 1, f"topk needs heads=1, the layer has {self.heads}")
        trains = self.training and self._step_options.commitment_cross_entropy
        require(self, not trains, "topk excludes commitment_use_cross_entropy_loss=True in training")
        trains = self.training and self.in_place_codebook_optimizer is not None
        require(self, not trains, "topk excludes in_place_codebook_optimizer in training")
        return min(int(topk), self.codebook_size)

    def _targets(self, indices: Tensor, grid: torch.Size) -> Tensor:
        expected = grid if self.heads == 1 else (*grid, self.heads)
        count = math.prod(expected)
        require(
            self,
            indices.numel() == count and indices.dtype == torch.int64,
            f"indices are {tuple(indices.shape)} {indices.dtype}, expected {tuple(expected)} torch.int64",
        )
        return self._heads.split_values(indices.reshape(expected))

    def _codes_of(self, indices: Tensor) -> Tensor:
        """(B, ..., heads) -> (B, ..., heads D), zeros at -1."""
        grid = indices.shape if self.heads == 1 else indices.shape[:-1]
        require(
            self,
            self.heads == 1 or indices.shape[-1] == self.heads,
            f"indices are {tuple(indices.shape)}, expected (..., {self.heads}), one for each head",
        )
        if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
            least, most = (int(value) for value in torch.aminmax(indices))
            wrong = least if least < -1 else most
            require(
                self,
                least >= -1 and most < self.codebook_size,
                f"indices hold {wrong}, expected -1 to {self.codebook_size - 1}",
            )
        rows = self._heads.split_values(indices)
        codes = take_codes(self._codebook.codes(), rows.clamp(min=0))
        return self._heads.merge(torch.where((rows >= 0)[..., None], codes, 0.0), grid)
