"""`ferrovae bench` from the command line: what is chosen, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bench import toy
from ferrovae.bench import catalogue, shapes
from ferrovae.bench.progress import Bar, Lines
from ferrovae.cli import main


@pytest.fixture
def only_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    toy.install(monkeypatch)


@pytest.mark.usefixtures("only_the_toy")
def test_measures_writes_and_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "toy.json"
    command = ["bench", "toy", "--device", "cpu", "--rounds", "3", "--threads", "1", "--shapes", "5,2,4", "tiger"]
    for _ in range(2):
        assert main([*command, "--json", str(path)]) == 0
    captured = capsys.readouterr()
    assert "N=8192 K=256 D=32" in captured.out
    assert "[1/2] toy N=5 K=2 D=4" in captured.err
    rows = json.loads(path.read_text())["rows"]
    assert [row["shape"]["N"] for row in rows] == [5, 5, 8192, 8192]


@pytest.mark.usefixtures("only_the_toy")
def test_a_wrong_result_is_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    toy.install(monkeypatch, lambda shape, device: iter([toy.case(shape, check=lambda name, result: False)]))
    assert main(["bench", "--device", "cpu", "--rounds", "3"]) == 1
    assert "FAILED: toy N=64 K=2 D=8 forward float32: the result is wrong" in capsys.readouterr().out


@pytest.mark.usefixtures("only_the_toy")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("chess", "'chess' is not a benchmark, expected one of toy, loader"),
        ("toy loader", "'loader' is measured alone and takes options of its own"),
        ("toy --shapes enigma", "shape 'enigma' is unknown, expected sizes such as 8192,1024,64 or one of vqgan"),
        ("toy --shapes 4,-5,6", "shape '4,-5,6' is unknown"),
        ("toy --shapes 4,5", "shape '4,5' has 2 sizes, expected N,K,D for toy"),
        ("--shapes 4,5", "no operation can have the shapes 4,5"),
        ("toy --rounds 0", "rounds is 0, expected at least 1"),
        ("toy --threads -1", "threads is -1, expected at least 0"),
        ("toy --simd sse9", "simd is 'sse9', expected one of portable, avx2, avx512"),
        ("toy --device cuda --simd avx2", "simd is for the CPU, but device is 'cuda'"),
        ("--plot --results no/such/place", "no results in no/such/place: ferrovae bench --json no/such/place"),
    ],
)
def test_refusals(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("only_the_toy")
@pytest.mark.parametrize("arguments", ["toy --device cuda", "--tune"])
def test_without_a_gpu(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert "no GPU" in error
    assert error.count("\n") == 1


def test_help_and_a_typo_do_not_import_torch() -> None:
    code = (
        "import sys; from ferrovae.cli import main\n"
        "try: main(['bench', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'triton', 'matplotlib'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--shapes" in done.stdout


def test_waiting_threads_are_told_to_sleep_before_torch_is_there() -> None:
    code = (
        "import os, sys; from ferrovae.cli import main; from ferrovae.bench import catalogue\n"
        "catalogue.planned = lambda *_: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules) or 1 / 0\n"
        "catalogue.operations = lambda: ('toy',)\n"
        "try: main(['bench', 'toy', '--device', 'cpu', '--simd', 'portable'])\nexcept ZeroDivisionError: pass\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "PASSIVE False\n", done.stderr


def test_operations_are_the_modules_with_shapes_and_cases(tmp_path: Path) -> None:
    for name in catalogue.operations():
        module = catalogue.module_of(name)
        assert all(isinstance(shape, dict) for shape in module.SHAPES)
        assert callable(module.cases)
    assert {"results", "show", "case"} & set(catalogue.operations()) == set()


def test_models_fit_an_operation_that_has_their_letters() -> None:
    stages = [{"N": 1, "K": 1, "D": 1, "Q": 1}]
    assert shapes.for_operation("rvq", stages, ["DAC"]) == [{"N": 4800, "K": 1024, "D": 8, "Q": 9}]
    assert shapes.for_operation("rvq", stages, []) == stages
    assert not shapes.fits(stages, "var")
    assert not shapes.fits([{"N": 1, "D": 1}], "dac")
    two = [{"N": 1, "D": 2}, {"N": 1, "C": 2, "H": 3}]
    assert shapes.for_operation("z", two, ["7,8,9", "7,8"]) == [{"N": 7, "C": 8, "H": 9}, {"N": 7, "D": 8}]
    for name, model in shapes.MODELS.items():
        assert name == name.lower()
        assert {"N", "K", "D"} <= set(model)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--simd", "portable"]])
def test_each_operation_has_a_process_of_its_own(more: list[str], tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "ferrovae", "bench", "code_sums", "sample_code", "--device", "cpu", *more]
    command += ["--shapes", "64,16,8", "--rounds", "1", "--json", str(path)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert {row["operation"] for row in found["rows"]} == {"code_sums", "sample_code"}
    assert len(found["runs"]) == 2
    assert not more or {row["simd"] for row in found["rows"]} == {"portable"}
    assert done.stdout.index("code_sums N=64") < done.stdout.index("sample_code N=64")


def test_the_bar_draws_only_between_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with Bar(3) as bar:
        bar.step(1, "toy N=8")
        assert threading.active_count() == before
        bar.step(3, "")
    capsys.readouterr()


def test_lines_keep_their_distance(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines(3) as lines:
        for done in range(3):
            lines.step(done, "toy")
    assert capsys.readouterr().err == "[1/3] toy\n"
