"""The README's tables, made from the committed results: `python -m ferrovae.bench.tables README.md`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a file of `benchmarks/` without `.json`, or,
over all files, `speed`: a line for each operation and peer, or `promises`: a line for each that was made.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ferrovae.bench import results
from ferrovae.bench.results import Row, is_ours
from ferrovae.bench.show import promise, shape, size

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
# What is named in a caption beside torch: packages, if a provider's name has the word.
_PEERS = ("vector-quantize-pytorch",)
_SOFTWARE = (("faiss-cpu", "faiss"), ("faiss-gpu", "faiss"), ("vector-quantize-pytorch", "vector-quantize-pytorch"))


def update(document: str, folder: Path) -> str:
    """The document with every table rendered anew from the JSON files in a folder.

    Raises:
        ValueError: a block names a table that is not known.
    """

    def block(match: re.Match[str]) -> str:
        return f"{match.group(1)}{render(match.group(2), folder)}\n{match.group(3)}"

    return _BLOCK.sub(block, document)


def render(name: str, folder: Path) -> str:
    """The table of that name, with its caption."""
    if name in _OF_ALL:
        return _OF_ALL[name](results.folder(folder))
    path = folder / f"{name}.json"
    if not path.is_file():
        known = ", ".join([*_OF_ALL, *sorted(file.stem for file in folder.glob("*.json"))])
        raise ValueError(f"tables: {name!r} is unknown, expected one of {known}")
    found = json.loads(path.read_text(encoding="utf-8"))
    if results.is_results(found):
        return operation(found)
    if "quantizers" in found:
        return quantizers(found)
    if "ratios" in found:
        return loader(found)
    raise ValueError(f"tables: {path.name} holds no table")


def operation(found: dict[str, Any]) -> str:
    """A line a case: how many times our time each peer takes, then our memory and share of the roof, where known."""
    groups = results.cases(found["rows"])
    peers = list(dict.fromkeys(row["provider"] for group in groups for row in group if not is_ours(row)))
    ours = [group[0] for group in groups if is_ours(group[0])]
    memory = any(row["memory"] is not None for row in ours)
    roof = any(row["of_roof"] is not None for row in ours)
    places = {place(row) for row in ours}
    name = ", ".join(dict.fromkeys(row["operation"] for row in ours))
    header = [name, *(["where"] if len(places) > 1 else []), *peers]
    header += [*(["extra memory"] if memory else []), *(["of roof"] if roof else [])]
    lines = []
    for group in groups:
        if not is_ours(group[0]):
            continue
        by_name = {row["provider"]: row for row in group}
        cells = [shape(group[0]), *([place(group[0])] if len(places) > 1 else [])]
        cells += [_times(by_name[peer]) if peer in by_name else "" for peer in peers]
        cells += [size(group[0]["memory"])] if memory else []
        cells += [_share(group[0])] if roof else []
        lines.append(cells)
    return f"{_table(header, lines)}\n\n{_caption(found, places)}"


def speed(found: dict[str, Any]) -> str:
    """A line an operation, place and peer: the smallest and the largest ratio over its cases."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in found["rows"]:
        if not is_ours(row) and row["correct"]:
            ratios.setdefault((row["operation"], place(row), row["provider"]), []).append(row["times_ours"])
    places = {where for _, where, _ in ratios}
    header = ["operation", *(["where"] if len(places) > 1 else []), "against", "times our time", "cases"]
    lines = [
        [name, *([where] if len(places) > 1 else []), peer, _range(values), str(len(values))]
        for (name, where, peer), values in ratios.items()
    ]
    return f"{_table(header, lines)}\n\n{_caption(found, places)}"


def promises(found: dict[str, Any]) -> str:
    """A line a promise: what was measured, and whether it is kept."""
    rows = [row for row in found["rows"] if row["met"] is not None]
    places = {place(row) for row in rows}
    header = ["operation", "case", *(["where"] if len(places) > 1 else []), "promise", "kept"]
    lines = []
    for row in rows:
        where = [place(row)] if len(places) > 1 else []
        lines.append([row["operation"], shape(row), *where, promise(row), "yes" if row["met"] else "no"])
    return f"{_table(header, lines)}\n\n{_caption({**found, 'rows': rows}, places)}"


def loader(found: dict[str, Any]) -> str:
    """The data loader's ratios of images a second."""
    rows = [[name, f"{value:.1f}x"] for name, value in found["ratios"].items()]
    machine = found["machine"]
    where = f"{machine['processor']}, {machine['simd']}, torch {machine['torch']}, numpy {machine['numpy']}"
    batch = f"batch {found['batch']}, float32, {found['threads']} threads"
    caption = f"Images/s as a multiple, {found['data']}, {batch}; {where}."
    return _table(["loader: ours / theirs", "ratio"], rows) + f"\n\n{caption}"


def quantizers(found: dict[str, Any]) -> str:
    """What a VQ-VAE reaches with every quantizer."""
    peer = next((row["train_cpu_seconds"] for row in found["quantizers"] if row["quantizer"] in _PEERS), None)
    rows = []
    for row in found["quantizers"]:
        share = "" if peer is None else f"{row['train_cpu_seconds'] / peer:.2f}"
        use = f"{row['perplexity']:.0f} of {row['codes']}"
        rows.append([f"`{row['quantizer']}`", f"{row['squared_error']:.5f}", use, share])
    machine = found["machine"]
    caption = (
        f"{found['data']}, {found['epochs']} epochs of training, networks of width {found['width']}, "
        f"{found['quantizers'][0]['images']} test images; training: CPU time, one thread, as a share of the peer's; "
        f"{machine['processor']}, torch {machine['torch']}."
    )
    header = ["--quantizer", "squared error per pixel", "perplexity", "training time"]
    return _table(header, rows) + f"\n\n{caption}"


def software(found: dict[str, Any]) -> str:
    """`torch 2.7.0, faiss-cpu 1.9, load average 1.2`: of all the runs."""
    runs = list(found["runs"].values())
    names = ["torch " + " or ".join(dict.fromkeys(str(run["torch"]) for run in runs))]
    providers = {row["provider"] for row in found["rows"]}
    used = [package for package, word in _SOFTWARE if any(word in provider for provider in providers)]
    used += ["triton"] if any(row["threads"] is None for row in found["rows"]) else []
    for package in used:
        versions = dict.fromkeys(run["versions"][package] for run in runs if package in run.get("versions", {}))
        names += [f"{package} {' or '.join(versions)}"] if versions else []
    policies = dict.fromkeys(run["omp_wait_policy"].lower() for run in runs if run.get("omp_wait_policy"))
    names += [f"OpenMP {' or '.join(policies)}"] if policies else []
    # Other work on the machine costs time that is nobody's: a reader must be able to see it.
    loads = [max(run["load_average"]) for run in runs if run.get("load_average")]
    names += [f"load average {max(loads):.1f}"] if loads else []
    return ", ".join(names)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _caption(found: dict[str, Any], places: set[str]) -> str:
    kind = "time on the GPU" if all(row["threads"] is None for row in found["rows"]) else "CPU time (on a GPU: time)"
    kind = "CPU time" if all(row["threads"] is not None for row in found["rows"]) else kind
    where = f"{next(iter(places))}, " if len(places) == 1 else ""
    return (
        f"How many times our {kind} the others take, interleaved in one run on the same inputs; float32, 2 threads "
        f"unless said, forward only or full: with the backward pass; {where}{software(found)}."
    )


def place(row: Row) -> str:
    """Processor and instruction set, or GPU."""
    return str(row["device"]) if row["simd"] is None else f"{row['device']} ({row['simd']})"


def _times(row: Row) -> str:
    return f"{number(row['times_ours'])}x" + ("" if row["correct"] else " (wrong)")


def _range(values: list[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return f"{low}x" if low == high else f"{low}x to {high}x"


def number(value: float) -> str:
    """Two or three digits: `0.95`, `1.32`, `14.9`, `161`."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _share(row: Row) -> str:
    return "" if row["of_roof"] is None else f"{100 * row['of_roof']:.0f} %"


_OF_ALL: dict[str, Callable[[dict[str, Any]], str]] = {"speed": speed, "promises": promises}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(update(path.read_text(encoding="utf-8"), path.parent / "benchmarks"), encoding="utf-8")
