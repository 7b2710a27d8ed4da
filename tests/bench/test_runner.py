"""The runner, with a toy operation: what is called in which order, and what is said of a wrong or broken provider."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import toy
from ferrovae.bench.case import Case, Work
from ferrovae.bench.measure import interleaved
from ferrovae.bench.memory import extra_bytes
from ferrovae.bench.roofline import Peaks
from ferrovae.bench.roofline import measured as measured_peaks
from ferrovae.bench.runner import Results, Settings, run

CPU = torch.device("cpu")
SHAPE = toy.SHAPES[0]


def measured(case: Case, **settings: Any) -> Results:
    def cases(*_: object) -> Iterator[Case]:
        yield case

    settings = {"rounds": 3} | settings
    peaks = Peaks(1e9, {"float32": 1e9})
    *_, last = run([("toy", SHAPE)], Settings(CPU, **settings), cases=cases, peaks=peaks)
    return last


def test_providers_take_turns() -> None:
    order: list[str] = []
    interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4


def test_a_sample_begins_with_a_call_that_is_not_counted() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = interleaved(calls, rounds=1, warmup=0, calls={"a": 2}, settle=True, sample=lambda *_: (1.0, 1.0))
    assert order == ["a", "b"]
    assert timings["a"].wall == (1.0,)


def test_a_heavy_peer_is_spared_and_time_ends_rounds() -> None:
    def sample(call: Any, calls: int) -> tuple[float, float]:
        return 1.0, 2.0

    timings = interleaved(dict.fromkeys("ab", lambda: None), rounds=9, at_most={"b": 3}, sample=sample)
    assert (len(timings["a"].wall), len(timings["b"].wall)) == (9, 3)
    timings = interleaved({"a": lambda: None}, rounds=9, warmup=0, seconds=0.0)
    assert len(timings["a"].wall) == 3


def test_quartiles() -> None:
    walls = iter([5.0, 1.0, 4.0, 2.0, 3.0])
    timing = interleaved({"a": lambda: None}, rounds=5, warmup=0, sample=lambda call, calls: (next(walls), 7.0))["a"]
    assert timing.quartiles == (2.0, 3.0, 4.0)
    assert (timing.p50, timing.cpu) == (3.0, 7.0)


def test_rows() -> None:
    results = measured(toy.case(SHAPE, variant="ones"))
    ours, eager = results.rows
    assert (ours["provider"], eager["provider"]) == ("ferrovae", "eager")
    assert ours["times_ours"] == 1
    assert eager["times_ours"] == pytest.approx(eager["cpu"] / ours["cpu"], rel=1e-4)
    assert 0 < ours["p25"] <= ours["p50"] <= ours["p75"]
    assert (ours["shape"], ours["variant"], ours["threads"], ours["rounds"]) == (SHAPE, "ones", 1, 3)
    assert ours["correct"]
    assert eager["correct"]
    assert results.failed == results.left_out == []
    assert eager["version"].split("+")[0] == torch.__version__.split("+")[0]
    run = results.run
    assert {"processor", "torch", "simd", "versions", "load_average", "peaks"} <= set(run)
    assert all(row["run"] == results.name for row in results.rows)


def test_a_wrong_peer_is_flagged_and_a_broken_one_left_out() -> None:
    providers = toy.case(SHAPE).providers
    wrong = {**providers, "off by one": lambda: torch.ones(SHAPE["N"]), "broken": lambda: [][0]}
    results = measured(toy.case(SHAPE, providers=wrong))
    assert {row["provider"]: row["correct"] for row in results.rows} == {
        "ferrovae": True,
        "eager": True,
        "off by one": False,
    }
    assert len(results.left_out) == 1
    assert "broken: IndexError: list index out of range" in results.left_out[0]
    assert results.failed == []


def test_our_own_wrong_result_fails_the_run_and_keeps_no_promise() -> None:
    providers = {"ferrovae": lambda: torch.zeros(SHAPE["N"]), "eager": toy.case(SHAPE).providers["eager"]}
    results = measured(toy.case(SHAPE, providers=providers, targets={"eager": 1e-9}, memory_limit=2**40))
    assert [row["met"] for row in results.rows] == [False, False]
    assert "the result is wrong" in results.failed[0]
    broken = measured(toy.case(SHAPE, providers={"ferrovae": lambda: 1 / 0}))
    assert broken.rows == []
    assert "ZeroDivisionError" in broken.failed[0]


@pytest.mark.parametrize(("factor", "kept"), [(1e-6, True), (1e6, False)])
def test_promises(factor: float, kept: bool) -> None:
    case = toy.case(SHAPE, targets={"eager": factor, "not installed": 2.0}, roof_target=min(factor, 1e3))
    ours, eager = measured(case).rows
    assert eager["met"] is kept
    assert ours["met"] is kept
    assert eager["target"] == factor
    assert measured(toy.case(SHAPE)).rows[0]["met"] is None


def test_threads_are_set_and_put_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    providers = {"ferrovae": lambda: seen.append(torch.get_num_threads())}
    case = toy.case(SHAPE, providers=providers, check=lambda name, result: True, threads=2)
    measured(case)
    assert set(seen) == {2}
    measured(case, threads=1)
    assert set(seen) == {2, 1}
    assert torch.get_num_threads() == before


def test_cases_that_differ_in_threads_alone_are_one_when_threads_are_given() -> None:
    def cases(*_: object) -> Iterator[Case]:
        yield from (toy.case(SHAPE, threads=threads) for threads in (1, 2))

    for threads, count in ((None, 4), (1, 2)):
        settings = Settings(CPU, rounds=3, threads=threads)
        *_, last = run([("toy", SHAPE)], settings, cases=cases, peaks=Peaks())
        assert len(last.rows) == count


def test_roof() -> None:
    peaks = Peaks(100.0, {"float32": 10.0})
    assert peaks.roof(Work(bytes=200, flops=10)) == 2.0
    assert peaks.roof(Work(bytes=200, flops=50)) == 5.0
    assert peaks.roof(Work()) is None
    assert peaks.roof(Work(bytes=200, flops=50, unit="bfloat16")) is None
    assert Peaks().roof(Work(bytes=1)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_sees_what_is_freed_but_not_what_is_returned() -> None:
    size = 100 * 2**20
    kept = extra_bytes(lambda: torch.ones(size // 4), CPU)
    if kept is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    freed = extra_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert freed is not None
    assert size * 0.98 <= freed <= size * 1.2
    assert kept <= size * 0.2
    assert extra_bytes(lambda: None, CPU) <= size * 0.02


def test_cases_are_checked() -> None:
    with pytest.raises(ValueError, match="expected 'ferrovae' first"):
        toy.case(SHAPE, providers={"eager": lambda: None})
    with pytest.raises(ValueError, match="mode is 'sideways'"):
        toy.case(SHAPE, mode="sideways")
    with pytest.raises(ValueError, match="unit is 'float8'"):
        Work(flops=1, unit="float8")


def test_this_machine_has_peaks() -> None:
    peaks = measured_peaks(CPU)
    assert peaks.bandwidth is not None
    assert 1e8 < peaks.bandwidth < 1e12
    assert all(1e8 < flops < 1e12 for flops in peaks.flops.values())
