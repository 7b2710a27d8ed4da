"""Keys of the run's random numbers: each draw is a function of (seed, step, example), never of call order."""

from __future__ import annotations

import numpy as np

_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014) of uint64 words: a bijection that flips half the bits."""
    words = words + _STRIDE
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))


def step_seed(seed: int, step: int) -> int:
    """The 63-bit seed of a step's draws. `seed` is mixed first: (seed, step + 1) is unrelated to (seed + 1, step)."""
    return int(mix(mix(np.array([seed], np.uint64)) ^ np.uint64(step))[0] >> np.uint64(1))


def held_out(length: int, fraction: float) -> int:
    """How many of `length` images, the last ones, are held out: round(fraction * length), but not none and not all."""
    return min(max(round(fraction * length), 1), length - 1) if fraction > 0 else 0
