"""How much of a computation fits into a memory budget, found by running small pieces of it and counting bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ferrovae.ops._registry import operations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storage that the block creates: `live` now, `peak` at most at one time.

    Storage that existed before (parameters, data) does not count. Scratch memory that a single operation of torch, or
    one of ours in Rust or Triton, takes and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to have Dynamo skip the method below, torch would import all of it at the first operation (seconds)."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            self._see(value, created=False)
        if func.namespace == "ferrovae" and func._opname in operations:
            # Ours are Python below the dispatcher, where no mode is active: enter again to see what they allocate.
            with self:
                result = operations[func._opname]._run(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            self._see(value, created=True)
        return result

    def _see(self, value: Any, *, created: bool) -> None:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if created else 0
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)


def largest_chunk(step: Callable[[int], object], limit: int, budget: int, what: str) -> int:
    """The most rows, at most `limit`, with which `step(rows)` stays within a third of `budget` bytes.

    A third, because the scratch memory of single operations is not seen (a float64 sum of float32 terms takes twice
    the terms). A peak is a maximum over moments of sums of
    parts that are constant or proportional to the rows, so `c` times the rows need at most `c` times the bytes: what
    one measurement allows is safe, and is measured again while it doubles.

    Raises:
        ValueError: one row alone needs more than the whole budget; `what` is put before the sentence.
    """
    rows, peak = 1, _peak(step, 1)
    if peak > budget:
        raise ValueError(f"{what} is {budget} bytes, but one image with one sample takes {peak}")
    while rows < limit:
        allowed = min(limit, rows * (budget // 3) // max(peak, 1))
        if allowed < 2 * rows:
            return max(rows, allowed)
        rows, peak = allowed, _peak(step, allowed)
    return rows


def _peak(step: Callable[[int], object], rows: int) -> int:
    with LiveBytes() as counter:
        step(rows)
    return counter.peak
