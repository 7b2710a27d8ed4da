"""A VQ-VAE with every kind of quantizer, the same networks and loop: `python -m ferrovae.bench.quantizers --data PATH`.

Each is trained and evaluated by the command line, as a user would, in a process of its own and one after the other on
one thread; its CPU time is that process's. All have about 256 codes on each place of the grid.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ferrovae.bench.machine import machine

QUANTIZERS = ("vq", "vector-quantize-pytorch", "residual-vq", "fsq", "lfq", "sim-vq")
# Threads that wait for each other spin, which is CPU time of nobody's.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def measure(name: str, data: str, epochs: int, width: int) -> dict[str, Any]:
    """One row: what training took, and what the evaluation of the test images found."""
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "run")
        options = ["--data", data, "--epochs", str(epochs), "--width", str(width), "--threads", "1"]
        seconds = _call("train", "vqvae", "--quantizer", name, "--run-dir", run, *options)
        _call("evaluate", run)
        found = json.loads((Path(run) / "evaluation.json").read_text(encoding="utf-8"))
    return {
        "quantizer": name,
        "train_cpu_seconds": seconds,
        "squared_error": found["squared_error"],
        "perplexity": found["perplexity"],
        "active_codes": found["active_codes"],
        "codes": len(found["code_counts"]),
        "images": found["data"]["images"],
    }


def _call(*arguments: str) -> float:
    """Run `ferrovae ARGUMENTS`; its CPU seconds.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "ferrovae", *arguments]
    ended = subprocess.run(command, env={**os.environ, **_ENVIRONMENT}, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"ferrovae {' '.join(arguments)} failed:\n{(ended.stdout + ended.stderr)[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line each, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m ferrovae.bench.quantizers", description=__doc__)
    parser.add_argument("--data", default="digits", help="as of `ferrovae train`: a folder of MNIST, or digits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=int, default=32, help="channels of the networks")
    parser.add_argument("--quantizers", nargs="+", choices=QUANTIZERS, default=QUANTIZERS)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.quantizers:
        row = measure(name, options.data, options.epochs, options.width)
        rows.append(row)
        print(
            f"{name:24} squared error {row['squared_error']:.5f}, perplexity {row['perplexity']:6.1f} of "
            f"{row['codes']}, training {row['train_cpu_seconds']:6.1f} CPU s",
            flush=True,
        )
    result = {
        "data": "MNIST" if "mnist" in options.data.lower() else options.data,
        "epochs": options.epochs,
        "width": options.width,
        "quantizers": rows,
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
