"""The least time a case can take here: what must be moved and computed, over what this machine was measured to do.

On a CPU the peaks are those of one thread, in CPU seconds, and so is the roof: it stands beside CPU time, whatever
the number of threads. On a GPU they are the device's. Main memory is what counts: inputs that stay in a cache from one
call to the next let a case go beyond its roof.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from ferrovae.bench.case import Work
from ferrovae.bench.machine import multiply_add_peak


@dataclass(frozen=True)
class Peaks:
    """Bytes read and written a second by a copy, and floating-point operations a second by unit; absent: not known."""

    bandwidth: float | None = None
    flops: dict[str, float] = field(default_factory=dict)

    def roof(self, work: Work) -> float | None:
        """Seconds that the work takes at least; None where nothing is known of it or of the machine."""
        bounds = []
        if work.bytes and self.bandwidth:
            bounds.append(work.bytes / self.bandwidth)
        if work.flops and work.unit in self.flops:
            bounds.append(work.flops / self.flops[work.unit])
        elif work.flops:
            return None  # the memory alone would be too low a roof to say anything
        return max(bounds, default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measured(device: torch.device) -> Peaks:
    """The peaks of this machine, now: a second on a CPU, about as long on a GPU."""
    return _of_gpu() if device.type == "cuda" else _of_one_thread()


def _of_one_thread(size: int = 2**28, repeats: int = 5) -> Peaks:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        times = []
        for _ in range(repeats):
            start = time.process_time()
            target.copy_(source)
            times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    peak = multiply_add_peak()
    flops = {} if peak is None else {"float32": peak, "float64": peak / 2}
    return Peaks(2 * size / median(times), flops)


def _of_gpu() -> Peaks:
    units = {"bfloat16": (torch.bfloat16, 8192), "float32": (torch.float32, 4096), "float64": (torch.float64, 4096)}
    return Peaks(_copy(), {unit: _matmul(dtype, n) for unit, (dtype, n) in units.items()})


def _copy() -> float:
    size = min(2**30, torch.cuda.mem_get_info()[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / _gpu_seconds(lambda: target.copy_(source))


def _matmul(dtype: torch.dtype, n: int) -> float:
    """Of random numbers: zeros run a tenth faster. In float32 the tensor cores, which would truncate, are kept out."""
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    reduced = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return 2 * n**3 / _gpu_seconds(lambda: a @ b)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = reduced


def _gpu_seconds(call: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return median(times)
