"""What of `make gpu-check` needs no GPU: the order, the sharing out of time, the verdicts, a part that ends badly."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from bench import toy
from bench.toy import row
from ferrovae.bench import catalogue, gpu_check, gpu_parts, results
from ferrovae.bench.roofline import Peaks

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "gpu-check: torch sees no GPU here\n"
    assert not (tmp_path / "out").exists()


def test_order(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = ("code_sums", "new_one", "nearest_code", "reparameterize_kl")
    monkeypatch.setattr(catalogue, "operations", lambda: operations)
    assert gpu_check.planned() == [
        *("ceilings", "tests", "score error", "nearest_code", "reparameterize_kl", "graph capture"),
        *("code_sums", "launch cost", "new_one"),
    ]


def test_time_is_shared_out_and_what_is_left_over_goes_on() -> None:
    parts = ["ceilings", "tests", "score error"]
    assert gpu_check.allotted(parts, 200.0) == pytest.approx(30.0)
    assert gpu_check.allotted(parts[1:], 190.0) == pytest.approx(190 * 14 / 17)
    assert gpu_check.allotted(parts[2:], 60.0) == 60.0
    assert gpu_check.allotted(parts, -5.0) == 0.0
    left = 100.0
    for number in range(len(parts)):
        left -= gpu_check.allotted(parts[number:], left)
    assert left == pytest.approx(0.0)


@no_gpu
def test_a_part_that_fails_and_one_that_takes_too_long(tmp_path: Path) -> None:
    assert gpu_check._apart("ceilings", tmp_path, 120.0) == ["FAILED: gpu-check: torch sees no GPU here"]
    assert gpu_check._apart("ceilings", tmp_path, 0.01)[-1].startswith("left out: the rest")


def test_a_report_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    assert gpu_check._read(path) == []
    path.write_text('{"line": "a"}\n{"line": "b"}\n{"li')
    assert gpu_check._read(path) == [{"line": "a"}, {"line": "b"}]


def test_an_operations_part_writes_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toy.install(monkeypatch)
    report = tmp_path / "report.jsonl"
    part = gpu_parts.operation("toy", "cpu")
    monkeypatch.setattr(gpu_parts, "operation", lambda name: part)
    (tmp_path / "ceilings.json").write_text(json.dumps(Peaks(1e9, {"float32": 1e9}).to_dict()))
    gpu_check._child("toy", report, time.monotonic() + 60, tmp_path)
    found = gpu_check._read(report)
    assert len(found) == len(toy.SHAPES)
    assert "toy N=64 K=2 D=8 1 thread: " in found[0]["line"]
    assert "x eager, right" in found[0]["line"]
    assert len(results.cases(found[-1]["results"]["rows"])) == len(toy.SHAPES)
    gpu_check._child("toy", report, time.monotonic() - 1, tmp_path)
    assert [finding["left_out"] for finding in gpu_check._read(report)] == [False, True]


def test_verdicts() -> None:
    ours = row("ferrovae", 1.0, operation="nearest_code", shape={"N": 8, "K": 4, "D": 64}, threads=None, simd=None)
    assert gpu_parts.shortfalls(ours | {"of_roof": 0.61}, [row("cdist + argmin", 5.1), row("faiss", 1.0)]) == []
    short = gpu_parts.shortfalls(ours | {"of_roof": 0.59}, [row("cdist + argmin", 4.9), row("eager", 0.9)])
    assert [text.split(" is ")[0] for text in short] == ["60 % of the roof", "5 x cdist + argmin", "1 x eager"]
    assert gpu_parts.shortfalls(ours | {"of_roof": 0.1, "shape": {"D": 8}}, []) == []
    line = gpu_parts.judged([ours | {"of_roof": 0.5}, row("eager", math.pi, correct=False)])
    assert line.startswith(
        "nearest_code N=8 K=4 D=64: 2 s, 50 % of the roof (1 s), 3.14 x eager (wrong), right, SHORT:"
    )


@no_gpu
def test_the_whole_run_writes_a_summary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "planned", lambda: ["tests", "score error"])
    monkeypatch.setattr(gpu_check, "_apart", lambda part, out, seconds: ["D=8: OUTSIDE the bound"])
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    assert gpu_check.check(tmp_path, time.monotonic() + 10, Path("tests/gpu")) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert "left out: tests/gpu, because pytest is not installed" in summary
    assert "score error\n  D=8: OUTSIDE the bound" in summary
