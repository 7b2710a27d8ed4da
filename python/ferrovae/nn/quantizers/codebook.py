"""The codebook of a vector quantizer: its vectors, how they follow the data, and what happens to unused ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from ferrovae.nn.quantizers.code_statistics import CodeStatistics, finite_rows
from ferrovae.nn.quantizers.dead_codes import dead, replacement_rows
from ferrovae.nn.quantizers.keyed_sampling import key_of
from ferrovae.nn.quantizers.kmeans import kmeans
from ferrovae.nn.quantizers.older_state import add_axis_of_heads, complaints_about_cosines
from ferrovae.ops import code_sums

EmaWeight = Tensor | float | Callable[[Tensor, Tensor], Tensor]


class CodebookOptions(NamedTuple):
    """How a codebook starts, moves and is shared; the arguments of `VectorQuantize` of the same names."""

    decay: float = 0.8
    eps: float = 1e-5
    kmeans_init: bool = False
    kmeans_iters: int = 10
    sync_kmeans: bool = True
    sync_codebook: bool | None = None
    use_cosine_sim: bool = False
    threshold_ema_dead_code: float = 0.0
    learnable_codebook: bool = False
    ema_update: bool = True
    manual_ema_update: bool = False
    shared_by_stages: bool = False  # of a residual stack, which then moves the codes once for all
    threshold_usage_ratio: float = 0.0  # a residual stack's: dead is also under this share of the mean count


class Codebook(nn.Module):
    """H codebooks of K vectors of D dimensions, with exponential moving averages of the rows that they attract.

    Its tensors have the names and shapes of vector-quantize-pytorch's codebook, and stay float32 whatever dtype the
    model around it is cast to: `initted` (), `cluster_size` (H, K), `embed_avg` (H, K, D), `embed` (H, K, D).

    A training step is `local_statistics` of this rank, their sum over the ranks, and `apply`: a stack of codebooks can
    gather those of all its stages and sum them together. Everything random is keyed by `cluster_size`, so a resumed
    run, and every rank, makes the same choices.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor
    age: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        options: CodebookOptions | None = None,
        vq_bridge: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.options = options = CodebookOptions() if options is None else options
        self.vq_bridge = vq_bridge
        shape = num_codebooks, codebook_size, dim
        if options.kmeans_init:
            embed = torch.zeros(shape, dtype=torch.float32)
        else:
            embed = self._normalized(nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.float32)))
        # What the tensor `initted` says, known to the host: no sync and no graph break in a step.
        self._started = not options.kmeans_init
        self.register_buffer("initted", torch.tensor(not options.kmeans_init))
        self.register_buffer("cluster_size", torch.ones(shape[:2], dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if options.learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.register_buffer("age", torch.zeros(shape[:2], dtype=torch.int32), persistent=False)

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow their moving averages."""
        return self.options.ema_update

    @property
    def replaces_dead_codes(self) -> bool:
        """Whether training replaces dead codes."""
        return self.options.threshold_ema_dead_code > 0 or self.options.threshold_usage_ratio > 0

    @property
    def synchronized(self) -> bool:
        """Whether statistics are summed over the ranks, where there are any."""
        return self.options.sync_codebook is not False

    @property
    def looks_up_embed(self) -> bool:
        """Whether `codes` gives `embed` itself."""
        return self.vq_bridge is None

    def codes(self) -> Tensor:
        """What rows are compared with and replaced by: (H, K, D), with the gradients of what can be learnt."""
        if self.vq_bridge is None:
            return self.embed
        # A copy, because replacing dead codes writes into `embed` before the backward pass.
        return self.vq_bridge(self.embed.clone())

    def observe(self, x: Tensor, valid: Callable[[], Tensor]) -> None:
        """See the rows (H, N, D) of a training step before they are looked up."""

    @torch.no_grad()
    def start(self, x: Tensor, valid: Callable[[], Tensor]) -> None:
        """Take the codes from k-means over the first batch that holds a valid row, in training or not.

        x: (H, N, D) float32; valid: gives (H, N) bool.
        """
        if self._started:
            return
        if not bool(self.initted):
            found = kmeans(
                x,
                valid(),
                self.codebook_size,
                self.options.kmeans_iters,
                key=key_of(self.cluster_size),
                cosine=self.options.use_cosine_sim,
                synchronized=self.synchronized and self.options.sync_kmeans,
            )
            if found is None:
                return
            means, counts = found
            self.cluster_size.copy_(counts)
            self.embed_avg.copy_(means * counts[..., None])
            self.update_ema()
            self.initted.fill_(True)
        self._started = True

    def wants_statistics(self, ema_update: bool | None = None) -> bool:
        """Whether a training step would use any; a call's `ema_update` overrides the codebook's."""
        return bool(self.options.ema_update if ema_update is None else ema_update) or self.replaces_dead_codes

    @torch.no_grad()
    def local_statistics(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> CodeStatistics:
        """Of this rank's rows: counts and sums by code, and rows for dead codes if those are replaced.

        x: (H, N, D) float32, of which rows that are not finite count nothing; indices: (H, N) int64, -1 counts
        nothing; mask: (H, N) bool, False counts nothing.
        """
        if mask is not None:
            indices = torch.where(mask, indices, -1)
        sums, counts = code_sums(x, indices, self.codebook_size, heads=True)
        sums = self._into_codebook_space(sums, counts[..., None])
        if not (self.replaces_dead_codes and self.training):
            return CodeStatistics(counts, sums)
        valid = finite_rows(x) if mask is None else finite_rows(x) & mask
        rows, filled = replacement_rows(x, valid, self.cluster_size, synchronized=self.synchronized)
        return CodeStatistics(counts, sums, self._into_codebook_space(rows, filled[..., None]), filled)

    @torch.no_grad()
    def apply_statistics(
        self,
        statistics: CodeStatistics,
        *,
        weight: EmaWeight | None = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """One training step from the statistics of all ranks: moving averages, codes, dead codes.

        weight: of this step in the moving averages, by code: (K,) or (H, K), or a function of sums and counts.
        accumulate: only keep the statistics; the next step that does not accumulate adds them to its own.
        """
        counts, sums, rows, filled = statistics
        # A sum that overflowed would poison its code for good.
        finite = finite_rows(sums)
        counts = torch.where(finite, counts, 0.0)
        sums = sums.masked_fill(~finite[..., None], 0.0)
        self.age.add_(1).masked_fill_(counts > 0, 0)
        if callable(weight):
            weight = weight(sums, counts)
        for average, new in ((self.cluster_size, counts), (self.embed_avg, sums)):
            if average.grad is not None:
                new = new + average.grad
            average.grad = new if accumulate else None
            if not accumulate:
                average.lerp_(new, self._rate(weight, average))
        if accumulate:
            return
        if (self.options.ema_update if ema_update is None else ema_update) and not self.options.manual_ema_update:
            self.update_ema()
        if rows is not None and filled is not None:
            self._replace_dead(rows, filled)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set each code to its mean: the moving sum over the moving count, Laplace-smoothed so that none is 0."""
        total = self.cluster_size.sum(dim=-1, keepdim=True)
        counts = (self.cluster_size + self.options.eps) / (total + self.codebook_size * self.options.eps) * total
        means = self._normalized(self.embed_avg / counts[..., None])
        self.embed.copy_(torch.where(total[..., None] > 0, means, self.embed))

    @torch.no_grad()
    def expire_codes_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Replace the dead codes by rows of x at once, in training; on several ranks, each code by the row of one.

        x: (H, N, D), of length 1 with cosine similarity; mask: (H, N) bool.
        """
        if not (self.replaces_dead_codes and self.training):
            return
        x = x.to(torch.float32)
        valid = finite_rows(x) if mask is None else finite_rows(x) & mask
        rows, filled = replacement_rows(x, valid, self.cluster_size, synchronized=False)
        self._replace_dead(self._into_codebook_space(rows, filled[..., None]), filled)

    def _rate(self, weight: Tensor | float | None, average: Tensor) -> Tensor | float:
        rate = 1 - self.options.decay
        if weight is None:
            return rate
        if not isinstance(weight, Tensor):
            return rate * weight
        if weight.shape not in (average.shape[:2], average.shape[1:2]):
            raise ValueError(
                f"VectorQuantize: ema_update_weight is {tuple(weight.shape)}, expected ({self.codebook_size},) "
                f"or {tuple(average.shape[:2])}"
            )
        weight = weight.to(average).expand(average.shape[:2])
        return rate * (weight if average.ndim == 2 else weight[..., None])

    def _into_codebook_space(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Sums (H, K, D) of rows as sums of what `embed` holds, from what `codes` gives; counts: (H, K, 1)."""
        return sums

    def _normalized(self, vectors: Tensor) -> Tensor:
        return normalize(vectors, dim=-1, eps=1e-6) if self.options.use_cosine_sim else vectors

    def _replace_dead(self, rows: Tensor, filled: Tensor) -> None:
        """Dead codes become a batch row, with the threshold as their count, or the mean count if that is larger."""
        threshold: Tensor | float = self.options.threshold_ema_dead_code
        count: Tensor | float = threshold
        if self.options.threshold_usage_ratio > 0:
            mean = self.cluster_size.mean(dim=-1, keepdim=True)
            threshold = (self.options.threshold_usage_ratio * mean).clamp(min=threshold)
            count = mean.clamp(min=count).expand_as(self.cluster_size)
        replaced = dead(self.cluster_size, filled, threshold)
        sums = rows * (count[..., None] if isinstance(count, Tensor) else count)
        self.embed.copy_(torch.where(replaced[..., None], rows, self.embed))
        self.embed_avg.copy_(torch.where(replaced[..., None], sums, self.embed_avg))
        self.cluster_size.copy_(torch.where(replaced, count, self.cluster_size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        """Move between devices, but keep float32: `.bfloat16()` would make the moving averages stand still."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

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
        add_axis_of_heads(state_dict, prefix)
        if self.options.use_cosine_sim:
            error_msgs += complaints_about_cosines(state_dict, prefix)
        for name, value in state_dict.items():
            if name.startswith(prefix) and value.is_floating_point():
                state_dict[name] = value.to(torch.float32)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.initted.is_meta:
            self._started = bool(self.initted)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, num_codebooks={self.num_codebooks}"


def take_codes(codes: Tensor, indices: Tensor) -> Tensor:
    """The codes of indices, head by head: codes (H, K, D), indices (H, ...) int64 -> (H, ..., D)."""
    heads, size, dim = codes.shape
    if heads > 1:
        first = size * torch.arange(heads, device=indices.device)
        indices = indices + first.view(-1, *(1 for _ in indices.shape[1:]))
    return embedding(indices, codes.reshape(heads * size, dim))
