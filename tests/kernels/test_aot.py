"""What the kernels need of the machines they ship for: compiled without a GPU, in a process without interpreter."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kernels.aot import TARGETS, operations

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or platform.system() != "Linux", reason="Triton compiles on Linux only"
)
TOOL = Path(__file__).with_name("aot.py")


@cache
def compiled(operation: str, first: bool) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--operations", operation, *(["--first"] if first else [])]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def check(record: dict[str, Any]) -> None:
    assert "error" not in record, record
    assert record["stack"] == record["local"] == record["spills"] == 0, record
    assert record["shared"] <= TARGETS[record["target"]][3], record
    assert 0 < record["registers"] <= (512 if record["target"].startswith("gfx") else 255), record


@pytest.mark.parametrize("operation", operations())
def test_first_configuration_fits_every_target(operation: str) -> None:
    records = compiled(operation, True)
    assert {record["target"] for record in records} == set(TARGETS)
    for record in records:
        check(record)


@pytest.mark.slow
@pytest.mark.parametrize("operation", operations())
def test_every_configuration_fits_every_target(operation: str) -> None:
    records = compiled(operation, False)
    assert {record["target"] for record in records} == set(TARGETS)
    for record in records:
        check(record)


def test_a_kernel_that_does_not_fit_is_found() -> None:
    record = {"target": "gfx942", "stack": 0, "local": 0, "spills": 0, "shared": 65536, "registers": 64}
    check(record)
    for wrong in ({"shared": 65537}, {"stack": 8}, {"spills": 1}, {"local": 4}, {"error": "x"}, {"registers": 600}):
        with pytest.raises(AssertionError):
            check(record | wrong)
