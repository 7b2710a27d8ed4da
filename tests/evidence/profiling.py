"""Memory as torch's profiler saw it at the allocator: independent of what the library counts."""

from __future__ import annotations

import torch


def peak_bytes(profile: torch.profiler.profile) -> int:
    """The most bytes that allocations of the profiled block held at one time."""
    live = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest
