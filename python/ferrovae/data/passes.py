"""One pass over an epoch: keeps the Rust pipeline fed with slots and hands out batches in order."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

import torch

from ferrovae.data._rust import DataError, Pipeline, span
from ferrovae.data.batches import Batch, Slot

if TYPE_CHECKING:
    from ferrovae.data.loader import Loader


class Pass:
    """An iterator over what is left of a loader's epoch.

    Slots in flight: `prefetch` while the consumer works, one more while it waits. Two others are with the consumer:
    the batch it just got, and the one before, which a `for` loop holds until the next is assigned. Step n is in slot
    n modulo their number.

    Python looks for signals around calls. A KeyboardInterrupt there loses nothing: the pipeline counts what was
    submitted and gives a step again until the next is asked for, and what says that a batch was handed out is written
    without a call between.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._ended: str | None = None
        device = loader.device
        self._target = None if device is None or device.type == "cpu" else device
        # The consumer's own asynchronous copies cannot be seen; torch's allocator of pinned memory waits for them.
        self._renew = loader.pin_memory and self._target is None and not loader.reuse
        self._start()

    def _start(self) -> None:
        loader = self._loader
        dataset = loader.dataset
        dataset.verify()
        self._pipeline = Pipeline(
            dataset,
            dataset.name,
            str(dataset.dtype).removeprefix("torch."),
            span(dataset.data),
            dataset.data[0].numel(),
            None if dataset.labels is None else span(dataset.labels),
            loader.shuffle,
            loader.seed,
            loader.epoch if loader.fixed_epoch is None else loader.fixed_epoch,
            loader.spec,
            (loader.position, loader.batch_size, loader.drop_last, loader.rank, loader.world_size),
            loader.threads,
        )
        # Also at interpreter exit and when an abandoned pass is collected.
        self._finalizer = weakref.finalize(self, self._pipeline.close)
        self._slots = loader._slots or [self._slot() for _ in range(loader.prefetch + 2)]
        loader._slots = self._slots
        self._handed = 0
        self._more = True
        self._process = os.getpid()

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> Batch:
        if self._ended is not None:
            if self._ended:
                raise RuntimeError(f"Loader: this iteration has ended: {self._ended}")
            raise StopIteration
        if os.getpid() != self._process:
            # A forked child has no threads: start again where the parent stood, and leave its pipeline be.
            self._finalizer.detach()
            self._start()
        loader = self._loader
        step = self._pipeline.submitted
        while self._more and step - self._handed <= loader.prefetch:
            self._submit(step)
            step += 1
        try:
            taken = self._pipeline.take(self._handed)
        except DataError as error:
            self.close(str(error))
            raise
        if taken is None:
            # As `loader.advance()`, but without a call between.
            self._ended, loader._epoch, loader._position = "", loader._epoch + 1, 0
            self.close("")
            raise StopIteration
        rows, examples = taken
        slot = self._slots[self._handed % len(self._slots)]
        batch = slot.batch(rows) if self._target is None else slot.copied(rows, self._target)
        self._handed += 1
        loader._position += examples
        return batch

    def close(self, reason: str) -> None:
        """End the iteration and join its threads; with a reason, further use is an error. May be called again."""
        if self._ended is None:
            self._ended = reason
        self._pipeline.close()
        # The next pass begins with the slots that the consumer has had no hold of for longest.
        first = self._handed % len(self._slots)
        self._loader._slots = self._slots[first:] + self._slots[:first]

    def _submit(self, step: int) -> None:
        number = step % len(self._slots)
        if self._renew or not (self._loader.reuse or self._slots[number].is_free()):
            self._slots[number] = self._slot()
        slot = self._slots[number]
        self._more = self._pipeline.submit(number, slot.addresses, slot.rows, slot)

    def _slot(self) -> Slot:
        loader = self._loader
        return Slot(
            loader.batch_size // loader.world_size,
            loader.dataset.shape,
            loader.dataset.dtype if loader.spec is None else torch.float32,
            labelled=loader.dataset.labels is not None,
            pinned=loader.pin_memory,
        )
