"""Results in the terminal: a small table a case, then what was promised and what was left out."""

from __future__ import annotations

import sys

from ferrovae.bench.results import Row, cases, is_ours

_WIDTH = 120  # where there is no terminal that has one
_COLUMNS = {"median": 8, "quartiles": 20, "CPU": 8, "memory": 9, "of roof": 7, "/ ours": 7, "right": 5, "promise": 7}


def print_results(rows: list[Row], left_out: list[str], failed: list[str]) -> None:
    """Print them on stdout; the quartiles only where there is room."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    providers = max([len(row["provider"]) for row in rows], default=8)
    room = console.width >= providers + sum(_COLUMNS.values()) + len(_COLUMNS)
    columns = {name: width for name, width in _COLUMNS.items() if room or name != "quartiles"}
    heads = "".join(f" {name:>{width}}" for name, width in columns.items())

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    for group in cases(rows):
        level = f" ({group[0]['simd']})" if group[0]["simd"] else ""
        say(f"{group[0]['operation']} {shape(group[0])}{level}", "bold")
        say(f"{'':{providers}}{heads}", "dim")
        for row in group:
            cells = "".join(f" {_figures(row)[name]:>{width}}" for name, width in columns.items())
            say(f"{row['provider']:{providers}}{cells}", "bold" if is_ours(row) else None)
        say("")
    for line in summary(rows):
        say(line)
    for text in left_out:
        say(f"left out: {text}")
    for text in failed:
        say(f"FAILED: {text}")


def shape(row: Row) -> str:
    """`N=8192 K=1024 D=64 full, binary, bfloat16, 1 thread`: what is not said is forward, float32, 2 threads."""
    sizes = " ".join(f"{letter}={size}" for letter, size in row["shape"].items())
    words = [] if row["mode"] == "forward" else [row["mode"]]
    words += [row["variant"]] if row["variant"] else []
    words += [] if row["dtype"] == "float32" else [row["dtype"]]
    if row["threads"] not in (None, 2) and "thread" not in row["variant"]:
        words.append(f"{row['threads']} thread{'s' * (row['threads'] != 1)}")
    return f"{sizes} {', '.join(words)}".rstrip()


def summary(rows: list[Row], *, kept: bool = True) -> list[str]:
    """How many promises are kept, and each with its figure; or only those that are not."""
    promised = [row for row in rows if row["met"] is not None]
    missed = [row for row in promised if not row["met"]]
    if not promised:
        return []
    lines = [f"{len(promised) - len(missed)} of {len(promised)} promises kept"]
    for row in sorted(promised if kept else missed, key=lambda row: not row["met"]):
        lines.append(f"{'kept' if row['met'] else 'MISSED'}: {row['operation']} {shape(row)}: {promise(row)}")
    return lines


def seconds(value: float) -> str:
    """Three digits with a unit: `12.3 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: float | None) -> str:
    """Bytes as `12.3 MiB`; a dash where they are not known."""
    if value is None:
        return "-"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def _figures(row: Row) -> dict[str, str]:
    return {
        "median": seconds(row["p50"]),
        "quartiles": f"{seconds(row['p25'])} .. {seconds(row['p75'])}",
        "CPU": seconds(row["cpu"]),
        "memory": size(row["memory"]),
        "of roof": "-" if row["of_roof"] is None else f"{100 * row['of_roof']:.0f} %",
        "/ ours": f"{row['times_ours']:.2f}",
        "right": "yes" if row["correct"] else "WRONG",
        "promise": "" if row["met"] is None else "kept" if row["met"] else "MISSED",
    }


def promise(row: Row) -> str:
    """`1.31 x faiss, promised 1.2 x`."""
    if not is_ours(row):
        return f"{row['times_ours']:.2f} x {row['provider']}, promised {row['target']:g} x"
    words = []
    if row["memory_limit"] is not None and row["memory"] is not None:
        words.append(f"{size(row['memory'])}, promised {size(row['memory_limit'])} at most")
    if row["roof_target"] is not None and row["of_roof"] is not None:
        words.append(f"{100 * row['of_roof']:.0f} % of the roof, promised {100 * row['roof_target']:.0f} %")
    return ", ".join(words) + ("" if row["correct"] else ", wrong")
