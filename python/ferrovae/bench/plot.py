"""Plots of committed results: for every operation, how many times our time the others take, as horizontal bars.

Drawn from the JSON alone, with hardware, dtype and versions below; the same results give the same file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from ferrovae.bench import results
from ferrovae.bench.results import Row, is_ours
from ferrovae.bench.show import shape
from ferrovae.bench.tables import number, place, software

# Okabe and Ito's colours, which most colour-blind readers can tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
_BAR = 0.17  # inches


def draw(folder: Path, operations: Sequence[str] = (), *, suffix: str = ".svg") -> list[Path]:
    """Draw one file an operation beside the results of a folder; returns the files.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    found = results.folder(folder)
    names = list(operations or dict.fromkeys(row["operation"] for row in found["rows"]))
    drawn = []
    for name in names:
        rows = [row for row in found["rows"] if row["operation"] == name]
        if not any(not is_ours(row) for row in rows):
            raise ValueError(f"bench: no results of {name} in {folder}: ferrovae bench {name} --json {folder}")
        drawn.append(figure({**found, "rows": rows}, folder / f"{name}{suffix}"))
    if not drawn:
        raise ValueError(f"bench: no results in {folder}: ferrovae bench --json {folder}")
    return drawn


def figure(found: dict[str, Any], path: Path) -> Path:
    """Draw results, one panel an operation and place, into an SVG or PNG file."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("bench: plots need matplotlib: pip install 'ferrovae[plot]'") from error
    panels = _panels(found["rows"])
    bars = [sum(len(group) - 1 for group in groups) + len(groups) for groups in panels.values()]
    inches = 0.9 + sum(_BAR * count + 0.9 for count in bars)
    with mpl.rc_context({"svg.hashsalt": "ferrovae", "svg.fonttype": "none", "font.size": 8}):
        drawing = Figure(figsize=(7.5, inches), layout="constrained")
        axes = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=[count + 3 for count in bars])
        for axis, (title, groups) in zip(axes[:, 0], panels.items(), strict=True):
            _bars(axis, title, groups)
        drawing.supxlabel(_caption(found), fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        drawing.savefig(path, dpi=110, metadata=metadata)
    return path


def _panels(rows: list[Row]) -> dict[str, list[list[Row]]]:
    """Title -> the cases in it that have a peer."""
    panels: dict[str, list[list[Row]]] = {}
    for group in results.cases(rows):
        if len(group) > 1 and is_ours(group[0]):
            panels.setdefault(f"{group[0]['operation']} on {place(group[0])}", []).append(group)
    return panels


def _bars(axis: Any, title: str, groups: list[list[Row]]) -> None:
    peers = list(dict.fromkeys(row["provider"] for group in groups for row in group[1:]))
    position, ticks = 0.0, []
    largest = 1.0
    for group in groups:
        first = position
        for row in group[1:]:
            ratio = row["times_ours"]
            colour = _COLOURS[peers.index(row["provider"]) % len(_COLOURS)]
            # From 1, where both take the same time: on this axis a bar has no other natural start.
            hatch = None if row["correct"] else "////"
            axis.barh(position, ratio - 1, left=1, height=0.85, color=colour, hatch=hatch)
            text = f" {number(ratio)}" + ("" if row["correct"] else " (wrong result)")
            axis.text(max(ratio, 1.0), position, text, va="center", fontsize=7)
            largest = max(largest, ratio)
            position += 1
        ticks.append(((first + position - 1) / 2, shape(group[0])))
        position += 1
    for number_of, peer in enumerate(peers):
        axis.barh(0, 0, left=1, color=_COLOURS[number_of % len(_COLOURS)], label=peer)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    smallest = min(row["times_ours"] for group in groups for row in group[1:])
    axis.set_xlim(min(0.9, smallest * 0.8), largest * 2)
    axis.set_ylim(position - 0.5, -1)
    axis.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks])
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=20)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: "")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(ncols=5, fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)


def _caption(found: dict[str, Any]) -> str:
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in found["rows"]))
    kinds = dict.fromkeys("time on the GPU" if row["threads"] is None else "CPU time" for row in found["rows"])
    text = f"Times our {' or '.join(kinds)} (ours = 1; more: we are faster), interleaved in one run. {dtypes}, "
    return fill(f"{text}forward and 2 threads unless said. {software(found)}.", 120)
