"""`make gpu-check`: everything that only a GPU can say, in one go: `python -m ferrovae.bench.gpu_check --out FOLDER`.

In the order in which the figures depend on each other: the GPU's ceilings; the GPU tests; the error of the search's
scores; the operations' benchmarks against the rooflines; graph capture; the cost of a launch. Each part has its share
of the time, what one leaves over goes to the next, and what was left out is said. FOLDER gets `results.json`,
`tests.txt`, `summary.txt` and `speed.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ferrovae.bench import catalogue, results

# Part -> its share of the time. Operations that are not named come at the end, with a share each.
SHARES: dict[str, float] = {
    "ceilings": 3,
    "tests": 14,
    "score error": 3,
    "nearest_code": 12,
    "reparameterize_kl": 8,
    "graph capture": 3,
    "code_sums": 5,
    "residual_nearest_code": 8,
    "launch cost": 4,
}
_OTHERS = 3.0
_GRACE = 5.0  # seconds between being told that time is over and being killed


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and write; returns the exit status: 1 if something was wrong, 2 if it cannot be checked here."""
    parser = argparse.ArgumentParser(prog="python -m ferrovae.bench.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-check"), help="the folder")
    parser.add_argument("--minutes", type=float, default=8.5, help="after so long it has ended")
    parser.add_argument("--tests", type=Path, default=Path("tests/gpu"), help="the GPU tests")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here", file=sys.stderr)
        return 2
    if options.part is not None:
        _child(options.part, options.report, time.monotonic() + 60 * options.minutes, options.out)
        return 0
    return check(options.out, time.monotonic() + 60 * options.minutes, options.tests)


def check(out: Path, end: float, tests: Path) -> int:
    """Run the parts one after another, and write what they found."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    parts = planned()
    summary: list[str] = []
    for number, part in enumerate(parts):
        seconds = allotted(parts[number:], end - time.monotonic())
        print(f"[{number + 1}/{len(parts)}] {part}, {seconds:.0f} s at most", file=sys.stderr, flush=True)
        lines = _tests(tests, out, seconds) if part == "tests" else _apart(part, out, seconds)
        summary += [part, *(f"  {line}" for line in lines), ""]
        (out / "summary.txt").write_text("\n".join(summary), encoding="utf-8")
    summary += _drawn(out)
    text = "\n".join(summary)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(word in text for word in ("FAILED", "WRONG", "OUTSIDE", "NOT EQUAL", "THE SAME")))


def planned() -> list[str]:
    """The parts in order; operations without a benchmark are not among them."""
    operations = catalogue.operations()
    named = [part for part in SHARES if part in operations or "_" not in part]
    return named + [name for name in operations if name not in SHARES]


def allotted(parts: Sequence[str], left: float) -> float:
    """Seconds of the first of the parts that remain, out of what is left for them all."""
    shares = [SHARES.get(part, _OTHERS) for part in parts]
    return max(0.0, left * shares[0] / sum(shares))


def _apart(part: str, out: Path, seconds: float) -> list[str]:
    """Run a part in a process of its own; what it found so far if it must be killed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        command = [sys.executable, "-m", "ferrovae.bench.gpu_check", "--part", part, "--report", str(report)]
        command += ["--minutes", str(max(seconds - _GRACE, 1.0) / 60), "--out", str(out)]
        try:
            ended = subprocess.run(command, timeout=seconds, stderr=subprocess.PIPE, text=True, check=False)
            trouble = "" if ended.returncode == 0 else f"FAILED: {_last_line(ended.stderr)}"
        except subprocess.TimeoutExpired:
            trouble = "left out: the rest; the part was stopped when its time was over"
        found = _read(report)
    new: dict[str, Any] = {"runs": {}, "rows": []}
    for finding in found:
        new = results.merged(new, finding["results"]) if finding["results"] else new
    if new["rows"]:
        results.write(out / "results.json", new)
    lines = [("left out: " if finding["left_out"] else "") + finding["line"] for finding in found]
    return [*lines, *([trouble] if trouble else [])]


def _child(part: str, report: Path, until: float, out: Path) -> None:
    """Measure a part, writing each finding as it comes."""
    from ferrovae.bench import gpu_parts
    from ferrovae.bench.roofline import Peaks

    known = out / "ceilings.json"
    peaks = Peaks(**json.loads(known.read_text(encoding="utf-8"))) if known.exists() else None
    parts = {
        "ceilings": gpu_parts.ceilings,
        "score error": gpu_parts.score_error,
        "graph capture": gpu_parts.graphs,
        "launch cost": gpu_parts.launches,
    }
    run = parts.get(part) or gpu_parts.operation(part)
    with report.open("w", encoding="utf-8") as file:
        for finding in run(until, peaks):
            if finding.peaks:
                known.write_text(json.dumps(finding.peaks), encoding="utf-8")
            file.write(json.dumps(asdict(finding)) + "\n")
            file.flush()


def _read(report: Path) -> list[dict[str, Any]]:
    """The findings in a report; a line cut short by a kill is not one."""
    found = []
    for line in report.read_text(encoding="utf-8").splitlines() if report.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _tests(tests: Path, out: Path, seconds: float) -> list[str]:
    """The GPU tests by pytest, stopped when their time is over."""
    if find_spec("pytest") is None:
        return [f"left out: {tests}, because pytest is not installed (pip install pytest)"]
    if not tests.is_dir():
        return [f"left out: {tests} is not here"]
    # Warnings are errors where the project is developed; here the versions are whatever the machine has.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", "-q", "-ra", str(tests)]
    log = out / "tests.txt"
    with log.open("w", encoding="utf-8") as file:
        try:
            ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return [f"left out: tests that had not run after {seconds:.0f} s; see {log.name}"]
    last = _last_line(log.read_text(encoding="utf-8"))
    return [last if ended.returncode == 0 else f"FAILED: {last}; see {log.name}"]


def _drawn(out: Path) -> list[str]:
    from ferrovae.bench import plot

    found = results.read(out / "results.json")
    if not found["rows"]:
        return ["left out: the plot, as there are no results"]
    try:
        plot.figure(found, out / "speed.png")
    except ImportError as error:
        return [f"left out: the plot ({error})"]
    return []


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


if __name__ == "__main__":
    sys.exit(main())
