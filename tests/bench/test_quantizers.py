"""The table of a VQ-VAE with every quantizer."""

from __future__ import annotations

import json

import pytest

from ferrovae.bench import quantizers, tables


@pytest.mark.slow
def test_each_is_trained_and_evaluated(tmp_path):
    out = tmp_path / "quantizers.json"
    quantizers.main(["--epochs", "1", "--width", "8", "--quantizers", "fsq", "lfq", "--out", str(out)])
    rows = json.loads(out.read_text())["quantizers"]
    assert [(row["quantizer"], row["codes"]) for row in rows] == [("fsq", 240), ("lfq", 256)]
    for row in rows:
        assert 0 < row["squared_error"] < 1
        assert 1 <= row["perplexity"] <= row["active_codes"] <= row["codes"]
        assert row["train_cpu_seconds"] > 0
    table = tables.render("quantizers", tmp_path)
    assert "| `fsq` |" in table
    assert "| 0." in table.splitlines()[2]


def test_a_run_that_fails_says_what_it_said(tmp_path):
    with pytest.raises(RuntimeError, match=r"ferrovae train vqvae --quantizer fsq .* failed:\n(.|\n)*nowhere"):
        quantizers.measure("fsq", str(tmp_path / "nowhere"), epochs=1, width=8)
