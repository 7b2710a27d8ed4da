"""Batches, and the memory they live in."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One batch of B examples.

    x: [B, *shape], float32 with a transform, else the dataset's dtype.
    label: [B] int64, or None.
    index: [B] int64: each example's place in the dataset.
    valid: [B] bool: false where a row only repeats another to give every rank the same number of rows.
    """

    x: Tensor
    label: Tensor | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    valid: Tensor


class Slot:
    """Memory for one batch: one storage for x, one small one for the rest.

    The slot hands out aliases and is free when no tensor beside its own shares its storages, whatever view of them
    the consumer, autograd or numpy may still hold.
    """

    __slots__ = (
        "_counts",
        "_event",
        "_located_at",
        "_pinned",
        "_storages",
        "addresses",
        "index",
        "label",
        "rows",
        "valid",
        "x",
    )

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype, *, labelled: bool, pinned: bool) -> None:
        self.rows = rows
        self.x = torch.empty((rows, *shape), dtype=dtype, pin_memory=pinned)
        words = torch.empty(2 * rows + -(-rows // 8), dtype=torch.int64, pin_memory=pinned)
        self.index = words[:rows]
        self.label = words[rows : 2 * rows] if labelled else None
        self.valid = words[2 * rows :].view(torch.bool)[:rows]
        del words
        self._storages = (self.x.untyped_storage(), self.index.untyped_storage())
        # Where Rust writes x, index, label and valid.
        label = 0 if self.label is None else self.label.data_ptr()
        self.addresses = self.x.data_ptr(), self.index.data_ptr(), label, self.valid.data_ptr()
        self._located_at = self._located()
        self._counts = self._shared()
        self._pinned = pinned
        self._event: torch.cuda.Event | None = None

    def is_free(self) -> bool:
        """Whether nobody else can see this memory, and it is still where it was."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._shared() == self._counts and self._located() == self._located_at

    def batch(self, rows: int) -> Batch:
        """Aliases of the first `rows` rows."""
        label = self.label
        if rows == self.rows:
            return Batch(
                self.x.detach(),
                None if label is None else label.detach(),
                self.index.detach(),
                self.valid.detach(),
            )
        return Batch(
            self.x.detach()[:rows],
            None if label is None else label.detach()[:rows],
            self.index.detach()[:rows],
            self.valid.detach()[:rows],
        )

    def copied(self, rows: int, device: torch.device) -> Batch:
        """A copy on `device`; from pinned memory it is asynchronous, and the slot waits for it before it is free."""
        pinned = self._pinned
        batch = self.batch(rows)
        x, index, valid = (part.to(device, non_blocking=pinned) for part in (batch.x, batch.index, batch.valid))
        label = None if batch.label is None else batch.label.to(device, non_blocking=pinned)
        if pinned:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
        return Batch(x, label, index, valid)

    def _shared(self) -> tuple[int, int, int, int]:
        """References to the storages: tensors count in C++, `Tensor.untyped_storage()` gives the one Python object."""
        count = torch._C._storage_Use_Count
        x, rest = self._storages
        return count(x._cdata), count(rest._cdata), sys.getrefcount(x), sys.getrefcount(rest)

    def _located(self) -> tuple[int, int]:
        x, rest = self._storages
        return x.data_ptr(), rest.data_ptr()
