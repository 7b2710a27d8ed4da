"""The benchmark measures what it says, and only correct results."""

from __future__ import annotations

import pytest

from ferrovae.bench.bernoulli_log_prob import measure_level


def test_rows_of_one_level() -> None:
    report = measure_level(((3, 17), (5, 64)), rounds=2, compiled=False)
    rows = report["rows"]
    assert [row["provider"] for row in rows] == [f"ferrovae {report['machine']['simd']}", "torch eager"] * 2
    assert [row["shape"] for row in rows] == [[3, 17]] * 2 + [[5, 64]] * 2
    assert report["machine"]["threads"] == 1
    for ours, eager in zip(rows[::2], rows[1::2], strict=True):
        assert 0 < ours["p20"] <= ours["p50"] <= ours["p80"]
        assert ours["max_relative_error"] < 2e-6
        assert ours["times_eager"] == pytest.approx(eager["p50"] / ours["p50"])
        assert eager["times_eager"] == 1
