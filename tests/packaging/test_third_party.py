"""THIRD_PARTY.md lists what is linked, as Cargo.lock has it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_third_party_is_up_to_date() -> None:
    if shutil.which("cargo") is None:
        pytest.skip("cargo is not installed")
    script = [sys.executable, str(ROOT / "rust" / "third_party.py"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
