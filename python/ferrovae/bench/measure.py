"""Interleaved timing: every provider once a round, rounds repeated, so that a drifting machine favours nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median, quantiles

__all__ = ["Call", "Sample", "Timing", "calls_for", "interleaved", "on_cpu", "on_gpu"]

Call = Callable[[], object]
Sample = Callable[[Call, int], tuple[float, float]]

# Threads of a pool that has just worked may spin for a while: that time is not the next provider's.
_REST = 0.003
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one entry a round: wall time (on a GPU, between its events) and CPU time of the process."""

    wall: tuple[float, ...]
    processor: tuple[float, ...]

    @cached_property
    def quartiles(self) -> tuple[float, float, float]:
        """25th, 50th and 75th percentile of the wall time."""
        if len(self.wall) == 1:
            return self.wall * 3
        low, middle, high = quantiles(self.wall, n=4, method="inclusive")
        return low, middle, high

    @property
    def p20(self) -> float:
        """20th percentile of the wall time."""
        return quantiles(self.wall, n=5, method="inclusive")[0]

    @property
    def p50(self) -> float:
        """Median wall time."""
        return median(self.wall)

    @property
    def p80(self) -> float:
        """80th percentile of the wall time."""
        return quantiles(self.wall, n=5, method="inclusive")[3]

    @property
    def cpu(self) -> float:
        """Median CPU time, of all threads together."""
        return median(self.processor)


def on_cpu(call: Call, calls: int) -> tuple[float, float]:
    """Wall and CPU seconds a call, averaged over `calls` of them; results are freed within the time."""
    time.sleep(_REST)
    cpu_start, start = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    stop, cpu_stop = time.perf_counter(), time.process_time()
    return (stop - start) / calls, (cpu_stop - cpu_start) / calls


def on_gpu(flush_bytes: int = 256 * 2**20) -> Sample:
    """A sample between events on the GPU, its cache emptied before each call; the second figure is the launch's time.

    Emptying the cache takes longer than a launch, so that the launch itself is hidden, as it is in a training step.
    """
    import torch

    scratch = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")

    def sample(call: Call, calls: int) -> tuple[float, float]:
        launch, pairs = 0.0, []
        for _ in range(calls):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            start.record()
            before = time.perf_counter()
            call()
            launch += time.perf_counter() - before
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in pairs) / calls / 1000, launch / calls

    return sample


def interleaved(
    providers: Mapping[str, Call],
    *,
    rounds: int = 15,
    warmup: int = 2,
    calls: Mapping[str, int] | None = None,
    at_most: Mapping[str, int] | None = None,
    seconds: float | None = None,
    settle: bool = False,
    sample: Sample = on_cpu,
) -> dict[str, Timing]:
    """Sample every provider once a round, in turn, `warmup` rounds uncounted and `rounds` counted.

    Args:
        calls: of a provider in one sample (default 1); fast ones take several.
        at_most: the counted rounds of a provider whose calls are long.
        seconds: after so long no round begins, once there are three.
        settle: call once uncounted before each sample, so that nobody finds the caches as another left them.
    """
    wall: dict[str, list[float]] = {name: [] for name in providers}
    processor: dict[str, list[float]] = {name: [] for name in providers}
    begun = time.perf_counter()
    for current in range(-warmup, rounds):
        late = seconds is not None and time.perf_counter() - begun > seconds
        if current >= _FEWEST_ROUNDS and late:
            break
        for name, call in providers.items():
            if current >= (at_most or {}).get(name, rounds):
                continue
            if settle:
                call()
            times = sample(call, (calls or {}).get(name, 1))
            if current >= 0:
                wall[name].append(times[0])
                processor[name].append(times[1])
    return {name: Timing(tuple(wall[name]), tuple(processor[name])) for name in providers}


def calls_for(call: Call, sample: Sample, *, least: float = 0.002, most: int = 200) -> int:
    """How many calls make a sample of `least` seconds, judged by the faster of two."""
    once = min(sample(call, 1)[0] for _ in range(2))
    return max(1, min(most, round(least / max(once, 1e-7))))
