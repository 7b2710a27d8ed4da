"""`ferrovae bench`: measure the operations against the alternatives, draw what is committed, tune the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

from ferrovae.bench import catalogue

LEVELS = ("portable", "avx2", "avx512f", "avx512")


@dataclass(frozen=True)
class Bench:
    """Measure operations against the alternatives: interleaved in one run, on the same inputs, results checked.

    Time is the median with its quartiles; CPU is that of all threads; memory is the peak beyond inputs and results;
    "of roof" is the least time that this machine could take, over the time taken (on a CPU: in CPU time of one thread);
    "/ ours" is a provider's CPU time (on a GPU: its time) over ours. On a CPU each operation has a process of its own.
    """

    operations: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of operations; none: all. `ferrovae bench loader` measures the data loader, with options of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto: on the GPU, if there is one."""
    shapes: tuple[str, ...] = ()
    """Sizes such as 8192,1024,64 (N,K,D), or models that have them (vqgan, dac, mimi, var); none: the operation's."""
    threads: int = 0
    """Threads of torch on a CPU; 0: as each case says."""
    rounds: int = 15
    """Rounds of every provider, at most."""
    simd: tuple[str, ...] = ()
    """Measure once at each of these instruction sets (portable, avx2, avx512f, avx512)."""
    json: Path | None = None
    """Add the results to this file, or to a file an operation in this folder; a rerun replaces its rows."""
    plot: bool = False
    """Measure nothing: draw the committed results."""
    tune: bool = False
    """Measure the candidate tiles of the Triton kernels on this GPU and write the best as their table."""
    results: Path = Path("benchmarks")
    """Folder of committed results and of their plots."""


def main(prog: str, arguments: list[str]) -> int:
    """Run; returns the exit status: 1 if a result of ours was wrong."""
    if arguments and arguments[0] in catalogue.PROGRAMS:
        import_module(f"ferrovae.bench.{arguments[0]}").main(arguments[1:])
        return 0
    options = tyro.cli(Bench, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone))
    catalogue.check(options.operations, options.shapes)
    # Before torch is there: OpenMP's threads spin while they wait, for milliseconds where others want the processors
    # too. That is no work, but CPU time, of this provider and of the next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name, value, least in (("threads", options.threads, 0), ("rounds", options.rounds, 1)):
        if value < least:
            raise ValueError(f"bench: {name} is {value}, expected at least {least}")
    if options.plot:
        from ferrovae.bench import plot

        for path in plot.draw(options.results, options.operations):
            print(path)
        return 0
    if options.tune:
        from ferrovae.bench import tune

        return tune.main(options.operations)
    return int(_levels(options) if options.simd else _here(options))


def _here(options: Bench) -> bool:
    """Measure in this process; whether a result was wrong."""
    import torch

    from ferrovae.bench import results, runner, show
    from ferrovae.bench.progress import for_terminal

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device is 'cuda', but torch sees no GPU here")
    gpu = options.device != "cpu" and torch.cuda.is_available()
    plan = catalogue.planned(options.operations, options.shapes)
    if not gpu and len({operation for operation, _ in plan}) > 1:
        return _apart(options, plan, (None,))
    device = torch.device("cuda" if gpu else "cpu")
    settings = runner.Settings(device, rounds=options.rounds, threads=options.threads or None)
    found = runner.Results()
    with for_terminal(len(plan)) as progress:
        for found in runner.run(plan, settings, step=progress.step):
            if options.json is not None:
                results.write(options.json, found.to_dict())
    show.print_results(found.rows, found.left_out, found.failed)
    return bool(found.failed)


def _levels(options: Bench) -> bool:
    """Measure at each instruction set, which a process reads once; whether a result was wrong."""
    from ferrovae.bench.machine import simd

    if options.device == "cuda":
        raise ValueError("bench: simd is for the CPU, but device is 'cuda'")
    here = simd()
    for level in options.simd:
        if level not in LEVELS:
            raise ValueError(f"bench: simd is {level!r}, expected one of {', '.join(LEVELS)}")
        if here not in LEVELS or LEVELS.index(level) > LEVELS.index(here):
            raise ValueError(f"bench: simd is {level!r}, but the kernels here go up to {here!r}")
    return _apart(options, catalogue.planned(options.operations, options.shapes), options.simd)


def _apart(options: Bench, plan: catalogue.Plan, levels: Sequence[str | None]) -> bool:
    """Measure each operation, at each level, in a process of its own; whether a result was wrong.

    What memory a process has asked for and freed decides how long the next allocation takes: without it some peers
    take twice the time, and no figure should hang on what was measured before.
    """
    from ferrovae.bench import results, show

    shapes: dict[str, list[str]] = {}
    for operation, shape in plan:
        shapes.setdefault(operation, []).append(",".join(map(str, shape.values())))
    command = [sys.executable, "-m", "ferrovae", "bench", "--device", "cpu"]
    command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
    wrong = False
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (level, operation) in enumerate(product(levels, shapes)):
            file = Path(folder) / f"{number}.json"
            own = [operation, "--json", str(file), *(["--shapes", *shapes[operation]] if options.shapes else [])]
            environment = os.environ | ({} if level is None else {"FERROVAE_SIMD": level})
            done = subprocess.run([*command, *own], env=environment, check=False)
            if not file.exists():
                raise RuntimeError(f"bench: {operation}: nothing was measured{f' at {level}' if level else ''}")
            wrong |= done.returncode != 0
            found = results.read(file)
            rows += found["rows"]
            if options.json is not None:
                results.write(options.json, found)
    for line in show.summary(rows, kept=False):
        print(line)
    return wrong
