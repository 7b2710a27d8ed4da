"""`bernoulli_log_prob` on a CPU beside torch: `python -m ferrovae.bench.bernoulli_log_prob --out FILE`.

Forward, one thread, float32. Every SIMD level runs in a process of its own (the level is read once a process),
interleaved there with torch eager, so that a ratio compares times of one run. torch.compile is measured in the last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ferrovae import ops
from ferrovae.bench import _likelihoods
from ferrovae.bench.case import Case
from ferrovae.bench.measure import interleaved, machine

SHAPES = [{"N": 240, "D": 784}, {"N": 5000, "D": 784}]
LEVELS = ("portable", "avx2", "avx512")
TARGETS = {"avx2": 2.0, "avx512": 4.0}  # times faster than eager


def eager(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What people write: x [N, D], logits [N, D] -> [N]."""
    return -binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)


def measure(*, rounds: int = 25) -> dict[str, Any]:
    """Rows for every level this processor has, the machine, and whether the targets are met, as JSON values."""
    description = machine()
    if description["simd"] not in LEVELS:
        raise RuntimeError("bernoulli_log_prob bench: the compiled extension is missing; run `make test`")
    levels = LEVELS[: LEVELS.index(str(description["simd"])) + 1]
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    reports = [_measured_apart(level, rounds, compiler and level == levels[-1]) for level in levels]
    rows = [row for report in reports for row in report["rows"]]
    ratios: dict[str, float] = {}
    for row in rows:
        if row["provider"].startswith("ferrovae"):
            ratios[row["simd"]] = min(row["times_eager"], ratios.get(row["simd"], float("inf")))
    return {
        "rows": rows,
        "targets": {
            level: {"target": target, "measured": ratios.get(level), "met": ratios.get(level, 0.0) >= target}
            for level, target in TARGETS.items()
        },
        "machine": reports[-1]["machine"],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _measured_apart(level: str, rounds: int, compiled: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "ferrovae.bench.bernoulli_log_prob", "--this-level", "--rounds", str(rounds)]
    command += ["--compiled"] if compiled else []
    environment = os.environ | {"FERROVAE_SIMD": level}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(finished.stdout)
    return report


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """N examples of D binary dimensions."""
    size, generator = (shape["N"], shape["D"]), torch.Generator().manual_seed(0)
    logits = (torch.randn(size, generator=generator) * 4).to(device)
    x = torch.rand(size, generator=generator).round().to(device)
    promised = device.type == "cpu" and machine()["simd"] == "avx512" and size == (240, 784)
    targets = {"torch eager": 4.0, "torch.compile": 2.0} if promised else {}
    yield from _likelihoods.cases("bernoulli_log_prob", shape, ops.bernoulli_log_prob, eager, x, (logits,), targets)


def measure_level(
    shapes: Sequence[tuple[int, int]] = ((240, 784), (5000, 784)), *, rounds: int = 25, compiled: bool
) -> dict[str, Any]:
    """Rows of this process's SIMD level, and the machine."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        description = machine()
        rows = [row for shape in shapes for row in _rows(shape, rounds, compiled, str(description["simd"]))]
        return {"rows": rows, "machine": description}
    finally:
        torch.set_num_threads(previous)


def _rows(shape: tuple[int, int], rounds: int, compiled: bool, level: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator) * 4
    x = torch.rand(shape, generator=generator).round()
    truth = eager(x.double(), logits.double())
    functions: dict[str, Callable[..., torch.Tensor]] = {
        f"ferrovae {level}": ops.bernoulli_log_prob,
        "torch eager": eager,
    }
    if compiled:
        functions["torch.compile"] = torch.compile(eager, dynamic=False)
    timings = interleaved(
        {name: partial(function, x, logits) for name, function in functions.items()}, rounds=rounds, warmup=3
    )
    per_element = 1e9 / logits.numel()
    return [
        {
            "operation": "bernoulli_log_prob",
            "provider": name,
            "mode": "forward",
            "simd": level,
            "shape": list(shape),
            "threads": 1,
            "metric": "time",
            "unit": "ns/element",
            "p20": timing.p20 * per_element,
            "p50": timing.p50 * per_element,
            "p80": timing.p80 * per_element,
            "cpu": timing.cpu * per_element,
            "times_eager": timings["torch eager"].p50 / timing.p50,
            "max_relative_error": float((functions[name](x, logits).double() / truth - 1).abs().max()),
        }
        for name, timing in timings.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m ferrovae.bench.bernoulli_log_prob", description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--this-level", action="store_true", help="only this process's level, as JSON on stdout")
    parser.add_argument("--compiled", action="store_true", help="with that, torch.compile too")
    options = parser.parse_args(arguments)
    if options.this_level:
        json.dump(measure_level(rounds=options.rounds, compiled=options.compiled), sys.stdout)
        return
    result = measure(rounds=options.rounds)
    for row in result["rows"]:
        place = f"{row['shape'][0]} x {row['shape'][1]}, beside {row['simd']}"
        print(f"{place:28} {row['provider']:20} {row['p50']:8.3f} ns/element {row['times_eager']:7.2f} x eager")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
