"""Keys and the held-out split: pure functions, checked against published values and laws."""

from __future__ import annotations

import numpy as np

from ferrovae.training.keys import held_out, mix, step_seed


def test_splitmix64_reference_values() -> None:
    """The first outputs of SplitMix64 seeded with 1234567, as published with its C code (Rosetta Code)."""
    stride = np.uint64(0x9E3779B97F4A7C15)
    state, found = np.array([1234567], np.uint64), []
    for _ in range(3):
        found.append(int(mix(state)[0]))
        state = state + stride
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_step_seeds_do_not_collide() -> None:
    seeds = {step_seed(seed, step) for seed in range(60) for step in range(60)}
    assert len(seeds) == 3600
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_held_out_counts() -> None:
    cases = [(1000, 0.05, 50), (10, 0.01, 1), (2, 0.9, 1), (7, 0.0, 0), (1, 0.5, 0), (1437, 0.05, 72)]
    assert [held_out(length, fraction) for length, fraction, _ in cases] == [count for *_, count in cases]
