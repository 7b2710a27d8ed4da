"""A toy operation with cases, for the tests of the runner: sums of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from ferrovae.bench import catalogue, roofline
from ferrovae.bench.case import Case, Work

SHAPES = [{"N": 64, "K": 2, "D": 8}, {"N": 100, "K": 2, "D": 3}]


def case(shape: dict[str, int], **changes: Any) -> Case:
    x = torch.ones(shape["N"], shape["D"])

    def check(provider: str, result: object) -> bool:
        return isinstance(result, torch.Tensor) and torch.equal(result.double(), x.double().sum(1))

    providers: dict[str, Callable[[], object]] = {"ferrovae": lambda: x.sum(1), "eager": lambda: (x * 1).sum(1)}
    toy = Case("toy", shape, providers, check, work=Work(bytes=x.nbytes), threads=1)
    return replace(toy, **changes)


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    yield case(shape)


def install(monkeypatch: Any, cases: Callable[..., Iterator[Case]] = cases) -> None:
    """Make it the only operation there is, on a machine whose peaks are known already."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, but undone
    monkeypatch.setattr(roofline, "measured", lambda device: roofline.Peaks(1e10, {"float32": 1e11}))
    monkeypatch.setattr(catalogue, "operations", lambda: ("toy",))
    monkeypatch.setattr(catalogue, "module_of", lambda name: SimpleNamespace(SHAPES=SHAPES, cases=cases))


def row(provider: str, ratio: float, **changes: Any) -> dict[str, Any]:
    """A row of results that nobody measured."""
    base = {"operation": "toy", "provider": provider, "mode": "forward", "dtype": "float32", "variant": ""}
    base |= {"shape": {"N": 8, "K": 4}, "device": "a processor", "threads": 2, "simd": "avx2", "metric": "time"}
    base |= {"p25": 1.0, "p50": 2.0, "p75": 3.0, "cpu": ratio, "memory": 3 * 2**20, "correct": True, "roof": 1.0}
    base |= {"of_roof": 0.5, "times_ours": ratio, "target": None, "met": None, "run": "first"}
    return base | changes
