"""The loader's benchmark runs, checks what it measures, and writes what the tables are made from."""

from __future__ import annotations

import json

from data.files import write_folder
from ferrovae.bench import loader


def test_writes_json(tmp_path, capsys):
    write_folder(tmp_path, zipped=True)
    loader.main(["--data", str(tmp_path), "--out", str(tmp_path / "loader.json"), "--rounds", "2"])
    result = json.loads((tmp_path / "loader.json").read_text())
    assert result["correct"]
    assert (result["images"], result["data"]) == (20, "MNIST, train")
    assert all(row["p20"] <= row["p50"] <= row["p80"] for row in result["rows"])
    assert set(result["targets"]) < set(result["ratios"])
    assert "images/s" in capsys.readouterr().out
