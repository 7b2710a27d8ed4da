"""Tile sizes by operation, architecture and class of shapes: a table, not a search at run time.

`configurations.json` beside this file, where there is one, comes before the built-in table; it has the same form,
`{"nearest_code": {"sm_90": {"D64": {"BLOCK_N": 128, ...}}}}`, and may leave out whatever it does not change. What
fits every target stands under "any". No entry has been measured on a GPU: they are the largest that compile without
spills.
"""

import json
from functools import cache
from pathlib import Path

import torch

FILE = Path(__file__).with_name("configurations.json")


def _entry(rows: int, codes: int, depth: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_N": rows, "BLOCK_K": codes, "BLOCK_D": depth, "num_warps": warps, "num_stages": stages}


TABLE: dict[str, dict[str, dict[str, dict[str, int]]]] = {
    "nearest_code": {
        "any": {
            "D16": _entry(128, 64, 16, 8, 2),
            "D32": _entry(128, 64, 32, 8, 2),
            "D64": _entry(64, 64, 64, 8, 2),
            "D128": _entry(64, 32, 128, 8, 2),
            "wide": _entry(64, 32, 32, 8, 2),
        },
        "sm_90": {
            "D16": _entry(128, 128, 16, 8, 3),
            "D32": _entry(128, 128, 32, 8, 3),
            "D64": _entry(128, 128, 64, 8, 2),
            "D128": _entry(128, 64, 128, 8, 2),
            "wide": _entry(128, 64, 32, 8, 3),
        },
        "sm_100": {
            "D16": _entry(128, 128, 16, 8, 3),
            "D32": _entry(128, 128, 32, 8, 3),
        },
    }
}


def tiles(operation: str, architecture: str, shape_class: str, file: Path = FILE) -> dict[str, int]:
    """The configuration: the file's entry over the built-in one, the architecture's over that for any."""
    found: dict[str, int] = {}
    for table in (TABLE, _read(file)):
        for name in ("any", architecture):
            found |= table.get(operation, {}).get(name, {}).get(shape_class, {})
    return found


@cache
def _read(file: Path) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@cache
def architecture(device: torch.device) -> str:
    """`"sm_90"`, `"gfx942"`; `"any"` for what is not a GPU."""
    if device.type != "cuda":
        return "any"
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return name.split(":")[0] or f"sm_{properties.major}{properties.minor}"
