"""The benchmark of `accelerate`: rows of two parts, equal codes, and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compat.models import encodec
from ferrovae.bench import accelerate


def test_rows_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subject = accelerate.Subject(
        "small",
        {"N": 40, "K": 64, "D": 16, "Q": 8},
        encodec(),
        torch.randn(1, 16, 40),
        lambda m, x: m.quantizer.encode(x),
        torch.randn(1, 1, 3000),
        lambda m, x: m.encode(x).audio_codes,
    )
    monkeypatch.setitem(accelerate.SUBJECTS, "encodec", lambda: subject)
    out = tmp_path / "accelerate.json"
    accelerate.main(["--models", "encodec", "--rounds", "3", "--threads", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [row["part"] for row in result["rows"]] == ["quantizer", "whole encoding"]
    assert [row["codes"] for row in result["rows"]] == [8 * 40, 2 * 10]
    for row in result["rows"]:
        assert row["codes_differ"] == 0
        assert row["ratio"] == row["before"]["cpu_seconds"] / row["after"]["cpu_seconds"]
    assert {"processor", "torch", "transformers"} <= set(result["machine"])
