"""`ferrovae bench --tune`: measure the candidate tiles of the Triton kernels on this GPU and write the best as a table.

The table is `configurations.json` beside the kernels, `{operation: {architecture: {shape class: configuration}}}`:

    {"nearest_code": {"sm_90": {"D64": {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}}}}

A kernel module takes part by having a function `tile` or `tiles` that returns the configuration it launches, as a
dictionary, and reads this table; `tune_candidates(shape_class) -> list[dict]` says what else to try than the usual
sizes. Candidates are timed interleaved, and one whose result is wrong, or that does not compile, is no candidate.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ferrovae.bench import catalogue
from ferrovae.bench.progress import for_terminal

Configuration = dict[str, int]
Table = dict[str, dict[str, dict[str, Configuration]]]

FILE = "configurations.json"
# Below this, a difference is noise, and the configuration stays.
_GAIN = 0.02
# The shape that stands for a class.
CLASSES: dict[str, dict[str, dict[str, int]]] = {
    "nearest_code": {
        name: {"N": 65536, "K": 8192, "D": dims}
        for name, dims in (("D16", 8), ("D32", 32), ("D64", 64), ("D128", 128), ("wide", 256))
    }
}
# What is tried of a module that says nothing else.
USUAL: dict[str, tuple[int, ...]] = {
    "BLOCK_N": (64, 128, 256),
    "BLOCK_K": (32, 64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3),
}


def main(operations: Sequence[str] = ()) -> int:
    """Tune the operations, or all that take part; returns the exit status.

    Raises:
        ValueError: there is no GPU, or a named operation has nothing to tune.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("bench: tuning measures the Triton kernels, and torch sees no GPU here")
    for name in operations:
        if name not in CLASSES:
            raise ValueError(f"bench: {name} has no tiles to tune, expected one of {', '.join(CLASSES)}")
    from ferrovae.ops._triton import kernels

    names = list(operations or CLASSES)
    path = Path(str(kernels(names[0]).__file__)).with_name(FILE)
    table = read(path)
    plan = [(name, shape_class) for name in names for shape_class in CLASSES[name]]
    with for_terminal(len(plan)) as progress:
        for done, (name, shape_class) in enumerate(plan):
            progress.step(done, f"{name} {shape_class}")
            candidates = [{}, *candidates_of(kernels(name), shape_class)]
            seconds = on_this_gpu(name, shape_class, candidates)
            print(report(name, shape_class, candidates, seconds), flush=True)
            table = with_best(table, name, architecture(), shape_class, candidates, seconds)
            write(path, table)
    print(path)
    return 0


def with_best(
    table: Table,
    operation: str,
    architecture: str,
    shape_class: str,
    candidates: Sequence[Configuration],
    seconds: Mapping[int, float],
) -> Table:
    """The table with the fastest candidate, if it beats the first, what is launched today, by more than noise."""
    if not seconds:
        return table
    best = min(seconds, key=lambda place: seconds[place])
    if 0 in seconds and seconds[best] > (1 - _GAIN) * seconds[0]:
        return table
    architectures = table.get(operation, {})
    classes = {**architectures.get(architecture, {}), shape_class: dict(candidates[best])}
    return {**table, operation: {**architectures, architecture: classes}}


def report(operation: str, shape_class: str, candidates: Sequence[Configuration], seconds: Mapping[int, float]) -> str:
    """A line each, fastest first."""
    lines = [f"{operation} {shape_class}: {len(seconds)} of {len(candidates)} ran and were right"]
    for place in sorted(seconds, key=lambda place: seconds[place]):
        text = " ".join(f"{name}={value}" for name, value in candidates[place].items()) or "as it is"
        lines.append(f"  {seconds[place] * 1e6:9.1f} us  {text}")
    return "\n".join(lines)


def read(path: Path) -> Table:
    """The table in a file; an empty one where there is no file."""
    table: Table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return table


def write(path: Path, table: Table) -> None:
    """Write the table, keys in order."""
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def architecture() -> str:
    """`sm_90`, `gfx942`: of the GPU in use."""
    import torch

    if torch.version.hip:
        return str(torch.cuda.get_device_properties().gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@contextmanager
def forced(module: ModuleType, configuration: Configuration) -> Iterator[None]:
    """Let the module launch that configuration, whatever its table says."""
    originals = {name: getattr(module, name) for name in ("tile", "tiles") if hasattr(module, name)}

    def replaced(original: Callable[..., Configuration]) -> Callable[..., Configuration]:
        return lambda *args, **kwargs: {**original(*args, **kwargs), **configuration}

    try:
        for name, original in originals.items():
            setattr(module, name, replaced(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def on_this_gpu(operation: str, shape_class: str, candidates: Sequence[Configuration]) -> dict[int, float]:
    """Median seconds of the candidates at the shape that stands for the class."""
    import torch

    from ferrovae.bench.measure import interleaved, on_gpu
    from ferrovae.ops._triton import kernels

    module = kernels(operation)
    case = next(catalogue.module_of(operation).cases(CLASSES[operation][shape_class], torch.device("cuda")))

    def launch(configuration: Configuration) -> Callable[[], object]:
        def call() -> object:
            with forced(module, configuration):
                return case.providers["ferrovae"]()

        return call

    calls: dict[str, Callable[[], Any]] = {}
    for place, configuration in enumerate(candidates):
        try:
            if case.check("ferrovae", launch(configuration)()):
                calls[str(place)] = launch(configuration)
        except Exception as error:
            print(f"{operation} {shape_class} {configuration}: {type(error).__name__}", file=sys.stderr)
    timings = interleaved(calls, rounds=15, seconds=20.0, sample=on_gpu())
    return {int(place): timing.p50 for place, timing in timings.items()}


def candidates_of(module: ModuleType, shape_class: str) -> list[Configuration]:
    """What the module offers for the class, or else every combination of the usual sizes."""
    offered = getattr(module, "tune_candidates", None)
    if offered is not None:
        return list(offered(shape_class))
    return [dict(zip(USUAL, values, strict=True)) for values in itertools.product(*USUAL.values())]
