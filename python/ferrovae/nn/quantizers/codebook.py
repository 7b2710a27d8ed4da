"""The codebook of a vector quantizer: its vectors, how they follow the data, and what happens to unused ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from ferrovae.nn.quantizers.code_statistics import all_reduce_packed, code_statistics, rank_and_world_size
from ferrovae.nn.quantizers.keyed_sampling import key_of, stratified_rows
from ferrovae.nn.quantizers.kmeans import kmeans
from ferrovae.ops import nearest_code


class Codebook(nn.Module):
    """K vectors of D dimensions with exponential moving averages of the rows they attract.

    Its tensors have the names and shapes of vector-quantize-pytorch's codebook, and stay float32 whatever dtype the
    model around it is cast to: `initted` (), `cluster_size` (1, K), `embed_avg` (1, K, D), `embed` (1, K, D).

    Everything random is keyed by `cluster_size`, so a resumed run, and every rank, makes the same choices.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        decay: float,
        eps: float,
        kmeans_init: bool,
        kmeans_iters: int,
        cosine: bool,
        dead_code_threshold: float,
        learnable: bool,
        ema_update: bool,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.size = size
        self.decay = decay
        self.eps = eps
        self.kmeans_iters = kmeans_iters
        self.cosine = cosine
        self.dead_code_threshold = dead_code_threshold
        self.ema_update = ema_update
        if kmeans_init:
            embed = torch.zeros(1, size, dim, dtype=torch.float32)
        else:
            embed = nn.init.kaiming_uniform_(torch.empty(1, size, dim, dtype=torch.float32))
            embed = self._normalized(embed)
        # What the tensor `initted` says, known to the host: no sync and no graph break in a step.
        self._started = not kmeans_init
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(1, size, dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    def vectors(self, indices: Tensor) -> Tensor:
        """(..., ) int64 -> (..., D) float32."""
        return embedding(indices, self.embed[0])

    def nearest(self, x: Tensor) -> Tensor:
        """(N, D) float32 -> (N,) int64; 0 for a row that is not finite."""
        return nearest_code(x, self.embed[0].detach(), metric="dot" if self.cosine else "euclidean")

    @torch.no_grad()
    def start(self, x: Tensor, valid: Tensor) -> None:
        """Take the codes from k-means over the first batch that holds a valid row, in training or not."""
        if self._started:
            return
        if not bool(self.initted):
            found = kmeans(x, valid, self.size, self.kmeans_iters, key=key_of(self.cluster_size), cosine=self.cosine)
            if found is None:
                return
            means, counts = found
            self.cluster_size[0].copy_(counts)
            self.embed_avg[0].copy_(means * counts[:, None])
            self._refresh()
            self.initted.fill_(True)
        self._started = True

    @torch.no_grad()
    def update(self, x: Tensor, indices: Tensor, valid: Tensor) -> None:
        """One training step: moving averages, codes, dead codes; one all-reduce.

        x: (N, D) float32; indices: (N,) int64 in [0, K); valid: (N,) bool: the rows that count.
        """
        replaces = self.dead_code_threshold > 0
        if not (self.ema_update or replaces):
            return
        parts = list(code_statistics(x, indices, valid, self.size))
        if replaces:
            parts += self._candidates(x, valid)
        counts, sums, *candidates = all_reduce_packed(parts)
        # A sum that overflowed would poison its code for good.
        finite = sums.isfinite().all(dim=-1)
        self.cluster_size[0].lerp_(torch.where(finite, counts, 0.0), 1 - self.decay)
        self.embed_avg[0].lerp_(torch.where(finite[:, None], sums, 0.0), 1 - self.decay)
        if self.ema_update:
            self._refresh()
        if replaces:
            self._replace_dead(*candidates)

    def _normalized(self, vectors: Tensor) -> Tensor:
        return normalize(vectors, dim=-1, eps=1e-6) if self.cosine else vectors

    def _refresh(self) -> None:
        """Set each code to its mean: the moving sum over the moving count, Laplace-smoothed so that none is 0."""
        total = self.cluster_size.sum(dim=-1, keepdim=True)
        counts = (self.cluster_size + self.eps) / (total + self.size * self.eps) * total
        means = self._normalized(self.embed_avg / counts[..., None])
        self.embed.copy_(torch.where(total[..., None] > 0, means, self.embed))

    def _candidates(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """A batch row for every code, dead or not, so that shapes are fixed: (K, D), and how many ranks gave one (K,).

        The ranks are taken to hold equally many rows; where they do not, a slot at a border may get none or two, and
        its code waits for the next step.
        """
        if x.shape[0] == 0:
            return x.new_zeros(self.size, self.dim), x.new_zeros(self.size)
        rank, world_size = rank_and_world_size()
        held = valid.sum()
        rows, filled = stratified_rows(
            valid,
            self.size,
            key_of(self.cluster_size),
            offset=rank * held,
            total=world_size * held,
            distinct=True,
        )
        return torch.where(filled[:, None], x[rows], 0.0), filled.to(x.dtype)

    def _replace_dead(self, rows: Tensor, ranks: Tensor) -> None:
        """Codes whose moving count is under the threshold become a batch row, with the threshold as their count."""
        dead = (self.cluster_size[0] < self.dead_code_threshold) & (ranks == 1)
        self.embed[0].copy_(torch.where(dead[:, None], rows, self.embed[0]))
        self.embed_avg[0].copy_(torch.where(dead[:, None], rows * self.dead_code_threshold, self.embed_avg[0]))
        self.cluster_size[0].masked_fill_(dead, self.dead_code_threshold)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        """Move between devices, but keep float32: `.bfloat16()` would make the moving averages stand still."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("cluster_size", "embed_avg", "embed"):
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name].to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.initted.is_meta:
            self._started = bool(self.initted)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, size={self.size}"
