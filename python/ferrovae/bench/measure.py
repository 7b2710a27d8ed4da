"""Interleaved timing: every provider once a round, rounds repeated, so that a drifting machine favours nobody."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds: 20th, 50th and 80th percentile of wall time, and the median CPU time."""

    p20: float
    p50: float
    p80: float
    cpu: float


def interleaved(providers: dict[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2) -> dict[str, Timing]:
    """Call every provider once a round, in turn, `warmup` rounds uncounted and `rounds` counted."""
    wall: dict[str, list[float]] = {name: [] for name in providers}
    cpu: dict[str, list[float]] = {name: [] for name in providers}
    for current in range(warmup + rounds):
        for name, call in providers.items():
            cpu_start, start = time.process_time(), time.perf_counter()
            call()
            stop, cpu_stop = time.perf_counter(), time.process_time()
            if current >= warmup:
                wall[name].append(stop - start)
                cpu[name].append(cpu_stop - cpu_start)
    result = {}
    for name, times in wall.items():
        fifths = quantiles(times, n=5, method="inclusive")
        result[name] = Timing(fifths[0], median(times), fifths[3], median(cpu[name]))
    return result


def machine() -> dict[str, str | int]:
    """The processor, the software versions and the settings a figure depends on."""
    import numpy
    import torch

    from ferrovae import __version__

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    try:
        from ferrovae import _core

        simd = _core.simd_level()
    except ImportError:
        simd = "none"
    return {
        "processor": processor,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "ferrovae": __version__,
        "simd": simd,
        "threads": torch.get_num_threads(),
    }
