"""The README's tables, made from the committed results: `python -m ferrovae.bench.tables README.md`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a file of `benchmarks/` without `.json`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def update(document: str, results: Path) -> str:
    """The document with every table rendered anew from the JSON files in `results`.

    Raises:
        ValueError: a block names a table that is not known.
    """

    def block(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise ValueError(f"tables: {name!r} is unknown, expected one of {', '.join(TABLES)}")
        found = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        return f"{match.group(1)}{TABLES[name](found)}\n{match.group(3)}"

    return _BLOCK.sub(block, document)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _machine(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['processor']}, {machine['simd']}, torch {machine['torch']}, numpy {machine['numpy']}"


def _loader(found: dict[str, Any]) -> str:
    rows = [[name, f"{value:.1f}x"] for name, value in found["ratios"].items()]
    batch = f"batch {found['batch']}, float32, {found['threads']} threads"
    caption = f"Images/s as a multiple, {found['data']}, {batch}; {_machine(found)}."
    return _table(["loader: ours / theirs", "ratio"], rows) + f"\n\n{caption}"


def _bernoulli_log_prob(found: dict[str, Any]) -> str:
    rows = [
        [
            row["provider"],
            " x ".join(map(str, row["shape"])),
            f"{row['times_eager']:.1f}x",
            f"{row['max_relative_error']:.0e}",
        ]
        for row in found["rows"]
    ]
    caption = f"Speed as a multiple of torch eager in the same run, one thread; {_machine(found)}."
    return _table(["bernoulli_log_prob", "shape", "speed", "relative error"], rows) + f"\n\n{caption}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"loader": _loader, "bernoulli_log_prob": _bernoulli_log_prob}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(update(path.read_text(encoding="utf-8"), path.parent / "benchmarks"), encoding="utf-8")
