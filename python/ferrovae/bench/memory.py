"""Peak memory of one call beyond what was there before it and beyond what it returns."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak less those before and those of the tensors returned; None where the system cannot say.

    On a CPU the process's resident memory (Linux), so that the allocations of every library count; on a GPU what
    torch's allocator gave out.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        _trim()
        if not _reset_peak():
            return None
        before = _resident("VmRSS")
        result = call()
        peak = _resident("VmHWM")
    return max(0, peak - before - _returned(result))


def _reset_peak() -> bool:
    """Set the high-water mark of the resident memory back to what is resident now."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _trim() -> None:
    """Give freed memory back to the system: reused, it would not show."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


def _returned(result: object) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(result)}
    return sum(storages.values())


def _tensors(value: object) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
