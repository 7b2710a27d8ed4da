"""The loader: what a user iterates, saves and resumes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ferrovae.data.batches import Batch, Slot
from ferrovae.data.dataset import Dataset
from ferrovae.data.passes import Pass
from ferrovae.data.transforms import Transform, as_tuple, compiled, described

FORMAT_VERSION = 1
DEFAULT_THREADS = 3


class Loader:
    """Batches of a dataset, filled by Rust threads ahead of the consumer.

    The order of an epoch is a pure function of (seed, epoch, number of examples) and random transforms of (seed,
    epoch, index): threads, batch size, ranks and interruptions change neither. Each `iter()` goes on with the
    current epoch from where it stands and, when it is exhausted, advances `epoch`; after a `break` the next
    `iter()` continues. Only one iteration of a loader is alive at a time. A loader pickles without its threads.

    Args:
        dataset: what to read.
        batch_size: examples in a batch, over all ranks; a multiple of `world_size`.
        seed: 0 <= seed < 2^64.
        shuffle: otherwise the order is that of the dataset.
        drop_last: leave out an incomplete last batch.
        transform: one or a list of `Scale`, `Binarize`, `Dequantize`; None gives the elements as they are stored.
        threads: that fill batches beside the consumer, which fills small ones itself where it would wait. Of data in
            memory no more are started than there are processors for; the attribute says how many. Default: up to 3.
        prefetch: batches filled ahead.
        reuse: let a batch be overwritten once `prefetch + 1` more have been asked for. By default memory is used
            again only when no tensor, view or array of the consumer's shares it, and is fresh otherwise.
        device: where batches go; default: they stay in the loader's memory on the CPU.
        pin_memory: page-locked memory, and asynchronous copies to `device`. It has no effect without CUDA; the
            attribute `pin_memory` says which.
        rank, world_size: rank r gets the r-th contiguous part of each batch. All ranks get the same number of rows
            at every step; in the last one, rows beyond the data repeat an example and have `valid` false.
        fixed_epoch: every pass uses this epoch's order and draws, and starts at the beginning: for evaluation.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        transform: Transform | Sequence[Transform] | None = None,
        threads: int | None = None,
        prefetch: int = 2,
        reuse: bool = False,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
        fixed_epoch: int | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"Loader: dataset is {type(dataset).__name__}, expected what ferrovae.data.open returns")
        _in_range("batch_size", batch_size, 1)
        _in_range("seed", seed, 0, 1 << 64)
        _in_range("prefetch", prefetch, 0, 1 << 16)
        _in_range("world_size", world_size, 1)
        _in_range("rank", rank, 0, world_size)
        if threads is not None:
            _in_range("threads", threads, 1, 1 << 10)
        if fixed_epoch is not None:
            _in_range("fixed_epoch", fixed_epoch, 0, 1 << 63)
        if batch_size % world_size:
            raise ValueError(f"Loader: batch_size is {batch_size}, expected a multiple of world_size {world_size}")
        if drop_last and batch_size > len(dataset):
            raise ValueError(f"Loader: batch_size is {batch_size}, but drop_last leaves nothing of {len(dataset)}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.drop_last, self.fixed_epoch = shuffle, drop_last, fixed_epoch
        self.transforms = as_tuple(transform)
        self.spec = compiled(self.transforms, dataset.dtype)
        self.threads = threads or DEFAULT_THREADS
        if threads is None or not dataset.mapped:  # several threads can wait for a disk
            self.threads = min(self.threads, useful_threads())
        self.prefetch, self.reuse = prefetch, reuse
        self.device = None if device is None else torch.device(device)
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.rank, self.world_size = rank, world_size
        self._epoch = self._position = 0
        self._resumed = False
        self._pass: weakref.ref[Pass] | None = None
        self._slots: list[Slot] = []

    @property
    def epoch(self) -> int:
        """Passes completed: the epoch that the next batch belongs to."""
        return self._epoch

    @property
    def position(self) -> int:
        """Examples of the current epoch that have been handed out, over all ranks."""
        return self._position

    def __len__(self) -> int:
        """Batches in a whole epoch: the same on every rank."""
        return self._steps(0)

    def __iter__(self) -> Iterator[Batch]:
        if self._pass is not None and (previous := self._pass()) is not None:
            previous.close("another iteration of this loader has begun")
        if self.fixed_epoch is not None and not self._resumed:
            self._position = 0
        if not self._steps(self._position):
            self.advance()
        current = Pass(self)
        self._pass = weakref.ref(current)
        self._resumed = False
        return current

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches handed out so far, as JSON values.

        A state taken after an epoch's last batch starts the next epoch.
        """
        finished = not self._steps(self._position)
        return {
            **self._identity(),
            "epoch": self._epoch + finished,
            "position": 0 if finished else self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state with the identical stream of examples; batch size and ranks may be others.

        Raises:
            ValueError: the state belongs to another dataset, seed, order or transform, or is no such state.
        """
        identity = self._identity()
        if not isinstance(state, dict) or set(state) != {*identity, "epoch", "position"}:
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            expected = sorted({*identity, "epoch", "position"})
            raise ValueError(f"Loader.load_state_dict: state has {found}, expected {expected}")
        for key, expected in identity.items():
            if state[key] != expected:
                raise ValueError(
                    f"Loader.load_state_dict: {key} is {state[key]!r} in the state, expected {expected!r} as in this "
                    "loader; the stream would not be the same"
                )
        _in_range("epoch", state["epoch"], 0, 1 << 63, "Loader.load_state_dict")
        _in_range("position", state["position"], 0, len(self.dataset), "Loader.load_state_dict")
        if self._pass is not None and (previous := self._pass()) is not None:
            previous.close("a state has been loaded into its loader")
        self._epoch, self._position, self._resumed = state["epoch"], state["position"], True

    def advance(self) -> None:
        """Begin the next epoch, whatever is left of this one."""
        self._epoch, self._position = self._epoch + 1, 0

    def _identity(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.dataset.fingerprint,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "transform": described(self.transforms),
            "fixed_epoch": self.fixed_epoch,
        }

    def _steps(self, position: int) -> int:
        remaining = len(self.dataset) - position
        return remaining // self.batch_size if self.drop_last else -(-remaining // self.batch_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pass": None, "_slots": []}


def useful_threads() -> int:
    """The processors this process may use, minus one for the consumer; at least 1.

    More would only take turns with the consumer and each other.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available - 1)


def _in_range(name: str, value: int, least: int, end: int | None = None, function: str = "Loader") -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{function}: {name} is {value!r}, expected an integer")
    if value < least or (end is not None and value >= end):
        bound = f"at least {least}" if end is None else f"from {least} to {end - 1}"
        raise ValueError(f"{function}: {name} is {value}, expected {bound}")
