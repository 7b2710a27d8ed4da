"""Sums over the ranks of a process group, and a clear complaint where the ranks do not act together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_EXACT = 1 << 23  # integers below are exact in float32
_GRACE = 2.0  # seconds: how far apart ranks may notice that somebody is missing


def rank_and_world_size() -> tuple[int, int]:
    """Asked at every call: a process group may be made after the layer."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all ranks of tensors of one dtype, by one all-reduce; the tensors themselves with one rank."""
    if rank_and_world_size()[1] == 1:
        return list(tensors)
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(packed)
    return _unpacked(packed, tensors)


class RankSum:
    """Sums the statistics of one step over the ranks by one all-reduce that also says whether they belong together.

    Beside the statistics every rank sends a signature of what it sums and the number of its step, in a place of its
    own. A rank that sends something else, or nothing within `timeout` seconds (it is in evaluation mode, or its
    codebook is frozen), is named in a `RuntimeError`. Under NCCL only what was sent is looked at, one step later so
    that the host need not wait, and a silent rank is left to the group's own time-out; compiled graphs look at nothing.

    Args:
        owner: the layer as its user knows it, for the message.
        timeout: seconds, positive.
    """

    def __init__(self, owner: str, timeout: float) -> None:
        self.owner = owner
        self.timeout = timeout
        self._step = 0
        self._unread: tuple[Tensor, torch.cuda.Event, int] | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of float32 tensors over all ranks; the tensors themselves where there is one rank."""
        rank, world_size = rank_and_world_size()
        if world_size == 1:
            return list(tensors)
        header = tensors[0].new_zeros(world_size, 2)
        header[rank, 0] = self._signature(tensors)
        header[rank, 1] = self._step % _EXACT
        packed = torch.cat([header.reshape(-1), *(tensor.reshape(-1) for tensor in tensors)])
        if torch.compiler.is_compiling():
            dist.all_reduce(packed)
        else:
            self._reduce(packed, rank, world_size)
            self._step += 1
        return _unpacked(packed[2 * world_size :], tensors)

    def _signature(self, tensors: Sequence[Tensor]) -> int:
        """A number in [1, 2^23) of the shapes."""
        value = 1
        for tensor in tensors:
            for size in (tensor.ndim, *tensor.shape):
                value = (value * 65599 + size) % (_EXACT - 1)
        return value + 1

    def _reduce(self, packed: Tensor, rank: int, world_size: int) -> None:
        self._read_last(rank)
        work = dist.all_reduce(packed, async_op=True)
        if packed.device.type != "cpu":
            work.wait()
            header = packed[: 2 * world_size].view(world_size, 2).to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._unread = header, arrived, self._step
            return
        try:
            work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise RuntimeError(self._complaint(rank, world_size)) from error
        self._compare(packed[: 2 * world_size].view(world_size, 2), rank, self._step)

    def _read_last(self, rank: int) -> None:
        """Look at the header of the step before, if the device is done with it."""
        if self._unread is not None and self._unread[1].query():
            header, _, step = self._unread
            self._unread = None
            self._compare(header, rank, step)

    def _compare(self, header: Tensor, rank: int, step: int) -> None:
        for other, (signature, other_step) in enumerate(header.to(torch.int64).tolist()):
            if [signature, other_step] != header[rank].to(torch.int64).tolist():
                what = "other statistics" if signature != int(header[rank, 0]) else f"those of its step {other_step}"
                raise RuntimeError(
                    f"{self.owner}: in training step {step} of rank {rank}, rank {other} sent {what}: the ranks must "
                    "train the same layers together"
                )

    def _complaint(self, rank: int, world_size: int) -> str:
        missing = _missing_ranks(f"ferrovae/{self.owner}/{self._step}", rank, world_size)
        names = " and ".join(f"rank {other}" for other in missing) if missing else "another rank"
        return (
            f"{self.owner}: rank {rank} waited {self.timeout:g} s in training step {self._step} for the statistics of "
            f"{names}: all ranks must train together (is one in evaluation mode, its codebook frozen, or gone?)"
        )


def _missing_ranks(key: str, rank: int, world_size: int) -> list[int]:
    """Who does not report as waiting too, within a moment; empty if that cannot be told."""
    try:
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        store.set(f"{key}/{rank}", "waits")
        others = [other for other in range(world_size) if other != rank]
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            others = [other for other in others if not store.check([f"{key}/{other}"])]
            if len(others) <= 1:
                break
            time.sleep(0.05)
        return others
    except (ImportError, RuntimeError):
        return []


def _unpacked(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = packed.split([tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
