"""Measures cases: results checked, memory probed, then all providers timed in turn, and the promises held to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from ferrovae.bench import catalogue, machine, memory, roofline
from ferrovae.bench.case import OURS, Case
from ferrovae.bench.measure import Call, Sample, calls_for, interleaved, on_cpu, on_gpu
from ferrovae.bench.results import Row

_HEAVY_ROUNDS = 3
Cases = Callable[[str, dict[str, int], torch.device], Iterator[Case]]


@dataclass
class Results:
    """Rows measured so far, sentences about what could not be, and the run's description."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # ours was wrong, or raised
    run: dict[str, Any] = field(default_factory=dict)
    name: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))

    def to_dict(self) -> dict[str, Any]:
        """What `results.write` takes."""
        return {"runs": {self.name: self.run}, "rows": self.rows}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        device: where.
        rounds: of every provider, at most.
        threads: of torch on a CPU; None as each case says.
        seconds: after so long a case's next round does not begin, once it has had three.
    """

    device: torch.device
    rounds: int = 15
    threads: int | None = None
    seconds: float | None = 30.0


def of_modules(operation: str, shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """The cases of `ferrovae.bench.<operation>`."""
    found: Iterator[Case] = catalogue.module_of(operation).cases(shape, device)
    return found


def run(
    plan: catalogue.Plan,
    settings: Settings,
    *,
    cases: Cases = of_modules,
    peaks: roofline.Peaks | None = None,
    step: Callable[[int, str], None] = lambda done, title: None,
) -> Iterator[Results]:
    """Measure the plan; yields the results so far after every case, and once more when the run is complete.

    Args:
        plan: operations and shapes.
        settings: how.
        cases: of an operation at a shape.
        peaks: of this machine; measured where none are given.
        step: hears before a case how many entries of the plan are done, and what comes.
    """
    results = Results(run=machine.describe(settings.device.type))
    peaks = roofline.measured(settings.device) if peaks is None else peaks
    results.run["peaks"] = peaks.to_dict()
    sample = on_gpu() if settings.device.type == "cuda" else on_cpu
    seen = set()
    for number, (operation, shape) in enumerate(plan):
        for case in cases(operation, shape, settings.device):
            title = (case.title, settings.threads or case.threads)
            if title in seen:  # with the number of threads given, cases that differ in nothing else are one
                continue
            seen.add(title)
            step(number, case.title)
            _with_threads(case, settings, peaks, sample, results)
            results.run["load_average"] = [*results.run["load_average"][:1], *machine.load()]
            yield results
            del case  # its inputs go before the next ones are made
    step(len(plan), "")
    yield results


def _with_threads(case: Case, settings: Settings, peaks: roofline.Peaks, sample: Sample, results: Results) -> None:
    previous = torch.get_num_threads()
    torch.set_num_threads(settings.threads or case.threads)
    try:
        _measure(case, settings, peaks, sample, results)
    finally:
        torch.set_num_threads(previous)


def _measure(case: Case, settings: Settings, peaks: roofline.Peaks, sample: Sample, results: Results) -> None:
    """Add a row for each provider that ran."""
    correct: dict[str, bool] = {}
    extra: dict[str, int | None] = {}
    calls: dict[str, int] = {}
    for name, call in case.providers.items():
        try:
            correct[name] = bool(case.check(name, call()))
            extra[name] = memory.extra_bytes(call, settings.device)
            calls[name] = 1 if case.heavy else calls_for(call, sample)
        except Exception as error:
            correct.pop(name, None)
            sentence = f"{case.title}: {name}: {type(error).__name__}: {_first_line(error)}"
            (results.failed if name == OURS else results.left_out).append(sentence)
            if name == OURS:
                return
    if not correct[OURS]:
        results.failed.append(f"{case.title}: the result is wrong")
    providers: dict[str, Call] = {name: case.providers[name] for name in correct}
    on_cpu = settings.device.type == "cpu"
    timings = interleaved(
        providers,
        rounds=settings.rounds,
        warmup=0 if case.heavy else 1,
        calls=calls,
        at_most={name: _HEAVY_ROUNDS for name in providers if case.heavy and name != OURS},
        seconds=settings.seconds,
        settle=on_cpu and not case.heavy,
        sample=sample,
    )
    roof = peaks.roof(case.work)
    basis = {name: timing.cpu if on_cpu else timing.p50 for name, timing in timings.items()}
    for name, timing in timings.items():
        low, middle, high = timing.quartiles
        row: Row = {
            "operation": case.operation,
            "provider": name,
            "version": machine.version_of(name),
            "mode": case.mode,
            "dtype": case.dtype,
            "variant": case.variant,
            "shape": dict(case.shape),
            "device": machine.device_name(settings.device.type),
            "threads": (settings.threads or case.threads) if on_cpu else None,
            "simd": machine.simd() if on_cpu else None,
            "metric": "time",
            "unit": "s",
            "p25": _rounded(low),
            "p50": _rounded(middle),
            "p75": _rounded(high),
            "cpu": _rounded(timing.cpu),
            "rounds": len(timing.wall),
            "memory": extra[name],
            "correct": correct[name],
            "roof": None if roof is None else _rounded(roof),
            "of_roof": None if roof is None else _rounded(roof / basis[name]),
            "times_ours": _rounded(basis[name] / basis[OURS]),
        }
        row |= _promises(case, name, row, right=correct[OURS])
        results.rows.append(row | {"run": results.name})


def _promises(case: Case, name: str, row: Row, *, right: bool) -> Row:
    """What is promised of the row, and whether it is kept (None: nothing is promised)."""
    if name != OURS:
        target = case.targets.get(name)
        return {"target": target, "met": None if target is None else right and row["times_ours"] >= target}
    kept = []
    if case.memory_limit is not None and row["memory"] is not None:
        kept.append(row["memory"] <= case.memory_limit)
    if case.roof_target is not None and row["of_roof"] is not None:
        kept.append(row["of_roof"] >= case.roof_target)
    met = right and all(kept) if kept else None
    return {"memory_limit": case.memory_limit, "roof_target": case.roof_target, "met": met}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _rounded(value: float) -> float:
    """Six significant digits: more is noise."""
    return float(f"{value:.6g}")
