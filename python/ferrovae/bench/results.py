"""Results as JSON: rows, one a provider and case, and the runs they came from; a rerun replaces its rows.

    {"runs": {"2026-01-02T03:04:05+00:00": {"processor": ..., "versions": ..., "load_average": ..., "peaks": ...}},
     "rows": [{"operation": ..., "provider": ..., "shape": {"N": ...}, ..., "p50": ..., "run": ...}]}

Everything of a row but what was measured, and with which version, is its key: versions and time are the run's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEY = ("operation", "provider", "mode", "dtype", "variant", "shape", "device", "threads", "simd", "metric")


def key(row: Row) -> str:
    """What two rows share of which the later replaces the earlier."""
    return json.dumps([row.get(field) for field in KEY], sort_keys=True)


def comparison(row: Row) -> str:
    """What the rows of one case share: their key without the provider."""
    return json.dumps([row.get(field) for field in KEY if field != "provider"], sort_keys=True)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old results with the new rows in the place of their older ones, and the runs that a row still names."""
    rows = {key(row): row for row in old.get("rows", ())}
    rows |= {key(row): row for row in new["rows"]}
    runs = {**old.get("runs", {}), **new["runs"]}
    named = {row["run"] for row in rows.values()}
    return {"runs": {name: run for name, run in runs.items() if name in named}, "rows": list(rows.values())}


def read(path: Path) -> dict[str, Any]:
    """The results in a file; none where there is no file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.exists():
        return {"runs": {}, "rows": []}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"bench: {path} is not JSON ({error})") from error
    if not is_results(found):
        raise ValueError(f"bench: {path} is not a file of results, expected runs and rows")
    return found


def is_results(found: object) -> bool:
    """Whether that is what `write` writes."""
    return isinstance(found, dict) and {"runs", "rows"} <= set(found)


def folder(path: Path) -> dict[str, Any]:
    """All results of a folder's JSON files, which may hold other things too."""
    found: dict[str, Any] = {"runs": {}, "rows": []}
    for file in sorted(path.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if is_results(content):
            found = merged(found, content)
    return found


def write(path: Path, new: dict[str, Any]) -> list[Path]:
    """Add results to a file, or to one file an operation in a folder; returns the files written.

    A folder is one that exists or a path without a suffix. A file is replaced whole: a killed run leaves the old one.
    """
    if not (path.is_dir() or not path.suffix):
        _replace(path, merged(read(path), new))
        return [path]
    path.mkdir(parents=True, exist_ok=True)
    written = []
    for operation in dict.fromkeys(row["operation"] for row in new["rows"]):
        rows = [row for row in new["rows"] if row["operation"] == operation]
        file = path / f"{operation}.json"
        _replace(file, merged(read(file), {"runs": new["runs"], "rows": rows}))
        written.append(file)
    return written


def cases(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows grouped by case, ours first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(comparison(row), []).append(row)
    return [sorted(group, key=lambda row: not is_ours(row)) for group in groups.values()]


def is_ours(row: Row) -> bool:
    """Whether the row is our own."""
    return bool(row["provider"] == "ferrovae")


def _replace(path: Path, found: dict[str, Any]) -> None:
    """One line a run and a row, so that a change reads well in a diff."""
    runs = ",\n".join(f" {json.dumps(name)}: {json.dumps(run)}" for name, run in found["runs"].items())
    rows = ",\n".join(f" {json.dumps(row)}" for row in found["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(f'{{"runs": {{\n{runs}\n}},\n"rows": [\n{rows}\n]}}\n', encoding="utf-8")
    beside.replace(path)
