"""The training step of a stack of codebooks: the statistics of all stages, summed over the ranks together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ferrovae.nn.quantizers.code_statistics import CodeStatistics
from ferrovae.nn.quantizers.codebook import Codebook, EmaWeight
from ferrovae.nn.quantizers.quantizer_dropout import stage_mask
from ferrovae.nn.quantizers.rank_sum import RankSum
from ferrovae.nn.quantizers.vector_quantize import VectorQuantize


class StageUpdate(NamedTuple):
    """What one stage saw of a batch."""

    book: Codebook
    statistics: CodeStatistics
    taken: Tensor | None = None  # bool []: False leaves the codebook alone, as the stage was dropped; None: taken
    if_used: bool = False  # taken only where a row of some rank went to the stage


class StageDropout(NamedTuple):
    """How many stages are kept, and so which codebooks take a training step; B samples."""

    kept: Tensor | None = None  # int64 [], or (B,) for each sample; None: all

    def mask(self, stage: int, grid: torch.Size) -> Tensor | None:
        """Whether the stage takes each token of a grid (B, ...): bool (B, ...), or None for all."""
        return None if self.kept is None else stage_mask(self.kept, stage, len(grid)).expand(grid)

    def mark(self, update: StageUpdate, stage: int) -> StageUpdate:
        """The stage's update, not to be taken where the stage is dropped altogether."""
        if self.kept is None:
            return update
        # Samples of other ranks are kept or not by other draws, but all ranks see the same counts.
        return update._replace(if_used=True) if self.kept.ndim else update._replace(taken=self.kept > stage)


class ResidualStage(VectorQuantize):
    """A `VectorQuantize` whose codebook's training steps its stack can take for it, with those of other stages.

    While `updates` is a list, a training step is put there instead of being applied.
    """

    updates: list[StageUpdate] | None = None

    def _update(
        self,
        rows: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        weight: EmaWeight | None = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        if self.updates is None:
            super()._update(rows, indices, mask, weight, accumulate, ema_update)
        elif self._codebook.wants_statistics():
            self.updates.append(StageUpdate(self._codebook, self._codebook.local_statistics(rows, indices, mask)))


@torch.no_grad()
def apply_updates(updates: Sequence[StageUpdate], sum_over_ranks: RankSum) -> None:
    """Sum the statistics of codebooks that are synchronized over the ranks, in one all-reduce, and apply them all.

    A codebook that stages share (`shared_by_stages`) takes their moving averages one after the other, and then its
    codes and dead codes once. The last of its updates holds rows for these.
    """
    joined = [update for update in updates if update.book.synchronized]
    if joined:
        sums = iter(sum_over_ranks([part for update in joined for part in update.statistics.parts()]))
        updates = [_summed(update, sums) if update.book.synchronized else update for update in updates]
    for number, update in enumerate(updates):
        if any(update.book is earlier.book for earlier in updates[:number]):
            continue
        own = [other for other in updates if other.book is update.book]
        if update.book.options.shared_by_stages:
            _apply_shared(update.book, own)
        else:
            _apply(update)


def _summed(update: StageUpdate, sums: Iterator[Tensor]) -> StageUpdate:
    parts = [next(sums) for _ in update.statistics.parts()]
    return update._replace(statistics=update.statistics.with_parts(parts))


def _apply(update: StageUpdate) -> None:
    book, statistics, taken = update.book, update.statistics, update.taken
    if update.if_used:
        taken = statistics.counts.sum() > 0
    if taken is None:
        book.apply_statistics(statistics)
        return
    # No branch on a tensor: take the step, then go back where it was not to be taken.
    tensors = book.cluster_size, book.embed_avg, book.embed, book.age
    before = [tensor.clone() for tensor in tensors]
    book.apply_statistics(statistics)
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(taken, tensor, old))


def _apply_shared(book: Codebook, updates: Sequence[StageUpdate]) -> None:
    age = book.age.clone()
    for update in updates:
        _apply(update._replace(statistics=update.statistics._replace(rows=None, filled=None)))
    used = torch.stack([update.statistics.counts for update in updates]).sum(dim=0) > 0
    book.age.copy_(torch.where(used, 0, age + 1))
    if book.ema_update:
        book.update_ema()
    last = updates[-1].statistics
    if last.rows is not None and last.filled is not None:
        book._replace_dead(last.rows, last.filled)


def shared_updates(
    book: Codebook, updates: list[StageUpdate], seen: Sequence[tuple[Tensor, Tensor | None]]
) -> list[StageUpdate]:
    """Updates of stages that share a codebook, the last with replacements for dead codes from the rows of all stages.

    seen: for each stage its rows (1, N, D) float32 and which of them count, bool (1, N), or None for all.
    """
    updates = [update._replace(statistics=update.statistics._replace(rows=None, filled=None)) for update in updates]
    if not (book.replaces_dead_codes and updates and seen):
        return updates
    rows = torch.cat([x for x, _ in seen], dim=1)
    mask = torch.cat([torch.ones_like(x[..., 0], dtype=torch.bool) if m is None else m for x, m in seen], dim=1)
    found = book.local_statistics(rows, torch.full_like(mask, -1, dtype=torch.int64), mask)
    last = updates[-1]
    with_rows = last.statistics._replace(rows=found.rows, filled=found.filled)
    return [*updates[:-1], last._replace(statistics=with_rows)]
