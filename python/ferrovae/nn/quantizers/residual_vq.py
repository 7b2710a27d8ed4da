"""Residual vector quantization: every stage quantizes what the stages before it left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ferrovae.nn.quantizers.checks import require
from ferrovae.nn.quantizers.codebook import Codebook, take_codes
from ferrovae.nn.quantizers.implicit_codebook import ImplicitCodebook
from ferrovae.nn.quantizers.layout import Layout, visible_tokens
from ferrovae.nn.quantizers.quantizer_dropout import QuantizerDropout
from ferrovae.nn.quantizers.rank_sum import RankSum
from ferrovae.nn.quantizers.residual_beam import beam_search
from ferrovae.nn.quantizers.residual_lookup import StackResult, look_up_stages, train_stages
from ferrovae.nn.quantizers.residual_stages import StageCall, each_stage
from ferrovae.nn.quantizers.residual_vq_options import stage_options
from ferrovae.nn.quantizers.stack_update import ResidualStage, StageDropout, StageUpdate, apply_updates
from ferrovae.nn.quantizers.straight_through import directional_reparam
from ferrovae.nn.quantizers.strictness import loads_strictly
from ferrovae.nn.quantizers.usage import CodebookUsage

_DIRECT_VARIANCE = 5e-3


class ResidualVQ(QuantizerDropout):
    """Q stages of `VectorQuantize` in a row (SoundStream, arXiv:2107.03312, algorithm 1).

    With r_0 = z: code_q is the code of stage q nearest to r_q, r_{q+1} = r_q - code_q, quantized = sum_q code_q. The
    residual carries no gradient of the codes, so every stage adds its own rotated or straight-through gradient to z.

    Arguments, results and `state_dict` are those of `vector_quantize_pytorch.ResidualVQ` 1.32, so either loads the
    other's checkpoints. Plain stages are looked up together, exactly and without an N x K matrix; options that need a
    stage's result before the next (sampling, learnt or implicit codes, cosine similarity, a beam, ...) go one by one.
    Every codebook moves after all stages are looked up. Under `torch.distributed` the statistics of all stages are
    summed over the ranks in one all-reduce; all ranks must train together, and hold the same codebooks to the bit.

    Args:
        dim: channels of x.
        num_quantizers: Q; by default the number of codebook sizes.
        codebook_size: K, or one for each stage.
        codebook_dim: D, dimensions of a code; where it is not `dim`, linear maps `project_in` and `project_out` go
            between.
        shared_codebook: one codebook for all stages. Its storage stands under every stage's key of the `state_dict`;
            a checkpoint that holds it under the first only loads too.
        diveq: in training go from z towards the sum of the codes, with noise in the direction (DiVeQ, Vali et al.,
            2025, arXiv:2509.26469), which trains the codes; no moving averages, no commitment loss.
        heads: 1.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of, quantize_dropout_per_sample:
            train for fewer stages, see `QuantizerDropout`.
        accept_image_fmap: x is (B, dim, H, W).
        implicit_neural_codebook: from the second stage on, a network makes the codes from those learnt and the sum of
            the codes before (QINCo, arXiv:2401.14732). `mlp_kwargs`: its `dim_hidden` and `depth`.
        beam_size: keep so many best sequences of codes after every stage rather than the best; `eval_beam_size` in
            eval mode, by default the same. `beam_score_quantizer_weights`: of each stage's squared error.
        quant_grad_frac: share of the gradient that reaches earlier stages' codes through the residual; 0 is none.
        return_zeros_for_masked_padding: masked vectors come out as zeros, otherwise as they came in.
        threshold_usage_ratio: replace a code whose moving count falls under this share of the mean count by a vector of
            the batch, with the mean count (Moshi, Defossez et al., 2024, arXiv:2410.00037); 0 never does.
        sync_timeout: seconds to wait for the statistics of other ranks before saying who is missing.
        vq_kwargs: other options of each stage's `VectorQuantize`.

    Raises:
        ValueError: sizes or options do not fit together.
        TypeError: an option is unknown.
    """

    beam_score_weights: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: Mapping[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        quantize_dropout_per_sample: bool = False,
        threshold_usage_ratio: float = 0.0,
        sync_timeout: float = 60.0,
        **vq_kwargs: Any,
    ) -> None:
        name = type(self).__name__
        require(
            name, num_quantizers is not None or isinstance(codebook_size, tuple | list), "num_quantizers is missing"
        )
        sizes = (
            tuple(codebook_size)
            if isinstance(codebook_size, tuple | list)
            else (codebook_size,) * (num_quantizers or 0)
        )
        count = len(sizes) if num_quantizers is None else num_quantizers
        require(name, len(sizes) == count, f"codebook_size has {len(sizes)} sizes for {count} stages")
        super().__init__(
            count,
            quantize_dropout=quantize_dropout,
            quantize_dropout_cutoff_index=quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=quantize_dropout_multiple_of,
            quantize_dropout_per_sample=quantize_dropout_per_sample,
        )
        require(self, heads == 1, f"heads is {heads}, expected 1: a residual stack has one")
        require(self, not shared_codebook or len(set(sizes)) == 1, f"shared_codebook=True needs one size, not {sizes}")
        require(self, eval_beam_size is None or beam_size is not None, "eval_beam_size needs beam_size")
        require(
            self,
            0 <= threshold_usage_ratio < 1,
            f"threshold_usage_ratio is {threshold_usage_ratio}, expected a number from 0 to 1",
        )
        layout = {key: vq_kwargs.pop(key) for key in ("channel_last", "accept_3d_fmap") if key in vq_kwargs}
        self._layout = Layout(dim, accept_image_fmap=accept_image_fmap, **layout)
        self.dim = dim
        self.codebook_dim = codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap = accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.implicit_neural_codebook = implicit_neural_codebook
        self.shared_codebook = shared_codebook
        self._steps_in_place = shared_codebook and not vq_kwargs.get("manual_in_place_optimizer_update")
        self.diveq = diveq
        self.codebook_sizes = sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        options = stage_options(vq_kwargs, shared=shared_codebook, implicit=implicit_neural_codebook, diveq=diveq) | {
            "return_zeros_for_masked_padding": return_zeros_for_masked_padding,
            "sync_timeout": sync_timeout,
        }
        self.layers = nn.ModuleList(
            [ResidualStage(codebook_dim, size, codebook_dim=codebook_dim, **options) for size in sizes]
        )
        for stage in self._stages()[1:] if shared_codebook else []:
            stage._codebook = self._books()[0]
        for book in self._books():
            book.options = book.options._replace(
                shared_by_stages=shared_codebook, threshold_usage_ratio=threshold_usage_ratio
            )
        self.vq_is_ema_updating = self._stages()[0].ema_update
        weights = [1.0] * count if beam_score_quantizer_weights is None else list(beam_score_quantizer_weights)
        require(self, len(weights) == count, f"beam_score_quantizer_weights has {len(weights)} for {count} stages")
        self.register_buffer("beam_score_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)
        self.mlps: nn.ModuleList | tuple[None, ...] = (None,) * (count - 1)
        if implicit_neural_codebook:
            shape = {} if mlp_kwargs is None else dict(mlp_kwargs)
            self.mlps = nn.ModuleList([ImplicitCodebook(codebook_dim, **shape) for _ in range(count - 1)])
        self._sum_over_ranks = RankSum(f"{name}(dim={dim}, num_quantizers={count})", sync_timeout)

    @property
    def codebook_size(self) -> int:
        """K of the first stage."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codebooks, (Q, K, D) float32, or Q of (K_q, D) where their sizes differ."""
        books = tuple(book.embed[0] for book in self._books())
        return torch.stack(books) if self.uniform_codebook_size else books

    def usage(self, indices: Tensor | None = None, threshold: float | None = None) -> tuple[CodebookUsage, ...]:
        """How each stage's codes are used, see `VectorQuantize.usage`; indices: (B, ..., Q), as `forward` gives them.

        Stages that share a codebook without indices report the same.
        """
        parts = [None] * self.num_quantizers if indices is None else self.complete_stages(indices).unbind(dim=-1)
        return tuple(stage.usage(part, threshold) for stage, part in zip(self._stages(), parts, strict=True))

    def dropout_state(self) -> Tensor | None:
        """What training moves alike on all ranks: the moving counts, or learnt codes."""
        book = self._books()[0]
        if book.wants_statistics():
            return book.cluster_size
        return book.embed if book.options.learnable_codebook else None

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The code of every stage: (B, ..., q) -> (Q, B, ..., D).

        -1, and stages beyond q, give zeros; fewer than Q stages need `quantize_dropout`.
        """
        indices = self.complete_stages(indices)
        self._check_range(indices)
        total: Tensor | float = 0.0
        codes = []
        for book, network, index in zip(self._books(), self._networks(), indices.unbind(dim=-1), strict=True):
            # A copy where a network differentiates through the codes, which training then writes to.
            all_codes = book.codes() if network is None else book.codes().clone()
            code = take_codes(all_codes, index.clamp(min=0)[None])[0]
            if network is not None and isinstance(total, Tensor):
                code = network.pairs(code, total)
            code = torch.where((index >= 0)[..., None], code, 0.0)
            total = code if not isinstance(total, Tensor) else total + code
            codes.append(code)
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices in eval mode, (B, ..., q) -> laid out as x."""
        quantized = self.get_codes_from_indices(indices).sum(dim=0)
        if isinstance(self.project_out, nn.Linear):
            quantized = self.project_out(quantized.to(self.project_out.weight.dtype))
        return self._layout.from_channel_last(quantized, single=quantized.ndim == 2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | Tensor | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize, and in training let the codebooks follow the batch afterwards.

        Args:
            x: (B, N, dim), (B, dim), or as the feature maps say; floating point.
            mask: bool (B, N), or as the indices without Q; False marks padding, which takes no part in anything.
            indices: int64 (B, ..., Q), or B of (..., Q): return the cross-entropies of softmax(-distance) at these
                codes. A stage's distances are from what the codes nearest to x left over.
            return_all_codes: also return the code of every stage.
            sample_codebook_temp, beam_size: override the layer's own for this call.
            freeze_codebook: leave the codebooks as they are in training.
            rand_quantize_dropout_fixed_seed: fixes how many stages are kept.

        Returns:
            quantized: shape and dtype of x.
            indices: int64 (B, ..., Q), the feature axes as in x; -1 where masked or dropped.
            losses: (Q,), float32 (float64 for a float64 x): each stage's, 0 in eval mode and where dropped.
            codes: only if asked for, (Q, B, ..., D), as used, zeros where dropped.

            With `indices` only quantized and the sum of the stages' cross-entropies in nats.

        Raises:
            ValueError: x, mask or indices have another shape, or indices lack a stage.
            TypeError: x is not floating point, or mask not bool.
        """
        outputs, updates = self.quantize(
            x,
            mask,
            indices,
            return_all_codes,
            sample_codebook_temp,
            freeze_codebook,
            beam_size,
            rand_quantize_dropout_fixed_seed,
        )
        apply_updates(updates, self._sum_over_ranks)
        self.step_in_place(freeze_codebook)
        return outputs

    def step_in_place(self, freeze_codebook: bool = False) -> None:
        """In training, let the optimizer of a shared codebook take its step, from the gradients of all stages.

        `forward` does, but with `manual_in_place_optimizer_update`.
        """
        if self._steps_in_place and self.training and not (freeze_codebook or self._frozen()):
            self._stages()[0].update_in_place_optimizer()

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None,
        indices: Tensor | Sequence[Tensor] | None,
        return_all_codes: bool,
        sample_codebook_temp: float | Tensor | None,
        freeze_codebook: bool,
        beam_size: int | None,
        seed: int | Tensor | None,
    ) -> tuple[tuple[Tensor, ...], list[StageUpdate]]:
        """`forward` but for the codebooks' training steps, which it returns beside the outputs."""
        tokens = self._layout.to_channel_last(self, x)
        visible = visible_tokens(type(self).__name__, tokens, mask, None)
        clean = tokens if visible is None else torch.where(visible[..., None], tokens, 0.0)
        projected = self.project_in(clean)
        targets = None if indices is None else self._targets(indices, tokens.shape[:-1], visible)
        drops = self.training and self.quantize_dropout and targets is None
        kept = self.kept_stages(x.shape[0], x.device, seed) if drops else None
        stages = self.num_quantizers
        if kept is not None and kept.ndim == 0 and not torch.compiler.is_compiling():
            stages, kept = int(kept), None
        call = StageCall(
            visible, StageDropout(kept), sample_codebook_temp, freeze_codebook or self._frozen(), self.quant_grad_frac
        )
        with torch.autocast(x.device.type, enabled=False):
            z = projected.to(torch.promote_types(x.dtype, torch.float32))
            result = self._run(z, call, stages, targets, beam_size)
            vectors = result.quantized
            if self.diveq and self.training:
                vectors = directional_reparam(z, vectors, _DIRECT_VARIANCE)
            codes = self.get_codes_from_indices(self._all_stages(result.indices)) if return_all_codes else None
        quantized = self.project_out(vectors.to(x.dtype))
        if visible is not None:
            padding = (
                torch.zeros_like(quantized) if self.return_zeros_for_masked_padding else tokens.to(quantized.dtype)
            )
            quantized = torch.where(visible[..., None], quantized, padding)
        quantized = self._layout.from_channel_last(quantized, single=x.ndim == 2)
        if targets is not None:
            return (quantized, result.losses.sum()), result.updates
        missing = self.num_quantizers - stages
        outputs = (quantized, pad(result.indices, (0, missing), value=-1), pad(result.losses, (0, missing)))
        return (outputs if codes is None else (*outputs, codes)), result.updates

    def _run(
        self, z: Tensor, call: StageCall, stages: int, targets: Tensor | None, beam_size: int | None
    ) -> StackResult:
        """The first `stages` stages of z (B, ..., D)."""
        layers, networks = self._stages()[:stages], self._networks()[:stages]
        width = beam_size if beam_size is not None else self.beam_size if self.training else self.eval_beam_size
        if targets is None and width is not None and width > 1:
            return beam_search(layers, networks, z, call, width, self.beam_score_weights)
        if targets is not None or not all(_plain(layer, self.training) for layer in layers) or self._chained():
            return each_stage(layers, networks, z, call, targets)
        books, grid = self._books()[:stages], z.shape[:-1]
        limits = _limits(call, stages, grid, z.device)
        rows = z.reshape(-1, z.shape[-1])
        if self.training:
            options = layers[0]._step_options
            found = train_stages(
                books,
                rows,
                limits,
                commitment_weight=options.commitment_weight,
                rotate=options.rotate,
                route=options.route,
                freeze=call.freeze,
                dropout=call.dropout,
            )
        else:
            found = look_up_stages(books, rows, limits)
        return found._replace(quantized=found.quantized.view(z.shape), indices=found.indices.view(*grid, len(layers)))

    def _chained(self) -> bool:
        return self.implicit_neural_codebook or (self.training and self.quant_grad_frac > 0)

    def _frozen(self) -> bool:
        return self._stages()[0].freeze_codebook

    def _stages(self) -> list[ResidualStage]:
        return cast("list[ResidualStage]", list(self.layers))

    def _books(self) -> list[Codebook]:
        return [stage._codebook for stage in self._stages()]

    def _networks(self) -> list[ImplicitCodebook | None]:
        return [None, *cast("list[ImplicitCodebook | None]", list(self.mlps))]

    def _all_stages(self, indices: Tensor) -> Tensor:
        return pad(indices, (0, self.num_quantizers - indices.shape[-1]), value=-1)

    def _targets(self, indices: Tensor | Sequence[Tensor], grid: torch.Size, visible: Tensor | None) -> Tensor:
        targets = indices if isinstance(indices, Tensor) else torch.stack(list(indices))
        due = (*grid, self.num_quantizers)
        require(
            self,
            tuple(targets.shape) == due and targets.dtype == torch.int64,
            f"indices are {tuple(targets.shape)} {targets.dtype}, expected {due} torch.int64",
        )
        if not torch.compiler.is_compiling():
            seen = targets if visible is None else torch.where(visible[..., None], targets, 0)
            require(self, not bool((seen == -1).any()), "indices hold -1, dropped stages: take those of eval mode")
        return targets

    def _check_range(self, indices: Tensor) -> None:
        if indices.device.type != "cpu" or torch.compiler.is_compiling() or not indices.numel():
            return
        for number, size in enumerate(self.codebook_sizes):
            least, most = (int(value) for value in torch.aminmax(indices[..., number]))
            wrong = least if least < -1 else most
            require(
                self,
                least >= -1 and most < size,
                f"indices hold {wrong} at stage {number}, expected -1 to {size - 1}",
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """A shared codebook may be there once, under the first stage: formats that know no shared storage do so.

        Loading that is not strict reports the other stages' keys as missing: `safetensors.torch.load_model` counts on
        that, as for any tensor that stands under several keys.
        """
        first = f"{prefix}layers.0._codebook."
        if self.shared_codebook and loads_strictly():
            for key in [key for key in state_dict if key.startswith(first)]:
                for number in range(1, self.num_quantizers):
                    state_dict.setdefault(f"{prefix}layers.{number}._codebook.{key[len(first) :]}", state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _plain(stage: ResidualStage, training: bool) -> bool:
    """Whether a stage only takes the nearest code of a codebook as it stands, with the simplest gradients and loss."""
    options, book = stage._step_options, stage._codebook
    fixed = type(book) is Codebook and book.vq_bridge is None and not isinstance(book.embed, nn.Parameter)
    if not (fixed and book._started) or options.cosine:
        return False
    return not training or not (
        options.stochastic
        or options.soft
        or options.direct
        or options.commitment_cross_entropy
        or options.diversity_weight > 0
    )


def _limits(call: StageCall, stages: int, grid: torch.Size, device: torch.device) -> Tensor | None:
    """How many stages each row goes through: int64 (N,), or None for all."""
    kept = call.dropout.kept
    if kept is None and call.mask is None:
        return None
    if kept is None:
        limits = torch.full(grid, stages, dtype=torch.int64, device=device)
    else:
        limits = kept.reshape(-1, *(1 for _ in grid[1:])).expand(grid)
    return (limits if call.mask is None else torch.where(call.mask, limits, 0)).reshape(-1)
