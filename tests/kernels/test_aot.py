"""What the kernels need of the machines they ship for: compiled without a GPU, in a process without interpreter."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from kernels.aot import TARGETS, identity, operations, write

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or platform.system() != "Linux", reason="Triton compiles on Linux only"
)
TOOL = Path(__file__).with_name("aot.py")
RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "aot.json"


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def check(record: dict[str, Any]) -> None:
    assert "error" not in record, record
    assert record["stack"] == record["local"] == record["spills"] == 0, record
    assert record["shared"] <= TARGETS[record["target"]][3], record
    assert 0 < record["registers"] <= (512 if record["target"].startswith("gfx") else 255), record


def test_first_configurations_fit_every_target() -> None:
    records = compiled("--first")  # all in one process: its imports take longer than one operation
    assert {(record["operation"], record["target"]) for record in records} == set(product(operations(), TARGETS))
    for record in records:
        check(record)


@pytest.mark.slow
@pytest.mark.parametrize("operation", operations())
def test_every_configuration_fits_every_target(operation: str) -> None:
    records = compiled("--operations", operation)
    assert {record["target"] for record in records} == set(TARGETS)
    for record in records:
        check(record)
    assert changes(records, json.loads(RECORD.read_text(encoding="utf-8")), version("triton")) == []


def changes(records: list[dict[str, Any]], recorded: dict[str, Any], installed: str) -> list[str]:
    """What differs from the record; nothing is said of another compiler, which allots registers as it likes."""
    if recorded["triton"] != installed:
        return []
    known = {identity(record): record for record in recorded["kernels"]}
    found = []
    for record in records:
        before = known.get(identity(record))
        if before is None:
            found.append(f"{identity(record)} is not in {RECORD.name}: python tests/kernels/aot.py --out {RECORD}")
        elif any(before[key] != record[key] for key in ("registers", "shared")):
            found.append(f"{record}, recorded {before}")
    return found


def test_the_record_is_compared_within_one_version_of_triton_only(tmp_path: Path) -> None:
    record = {"operation": "a", "kernel": "k", "target": "sm_90", "name": "", "registers": 64, "shared": 0}
    other = record | {"operation": "b"}
    path = tmp_path / "aot.json"
    write(path, [record, other], "3.9.0")
    write(path, [record | {"registers": 80}, record | {"name": "new", "registers": 1}], "3.9.0")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert [(line["operation"], line["registers"]) for line in recorded["kernels"]] == [("a", 80), ("a", 1), ("b", 64)]
    assert changes([other], recorded, "3.9.0") == []
    assert "recorded" in changes([record], recorded, "3.9.0")[0]
    assert changes([record], recorded, "3.10.0") == []
    assert "is not in" in changes([record | {"name": "unknown"}], recorded, "3.9.0")[0]
    write(path, [other], "3.10.0")
    assert json.loads(path.read_text(encoding="utf-8")) == {"triton": "3.10.0", "kernels": [other]}
    with pytest.raises(ValueError, match="boom"):
        write(path, [record | {"error": "boom"}], "3.10.0")


def test_every_operation_is_in_the_record() -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    assert {record["operation"] for record in recorded["kernels"]} == set(operations())
    for record in recorded["kernels"]:
        check(record)


def test_a_kernel_that_does_not_fit_is_found() -> None:
    record = {"target": "gfx942", "stack": 0, "local": 0, "spills": 0, "shared": 65536, "registers": 64}
    check(record)
    for wrong in ({"shared": 65537}, {"stack": 8}, {"spills": 1}, {"local": 4}, {"error": "x"}, {"registers": 600}):
        with pytest.raises(AssertionError):
            check(record | wrong)
