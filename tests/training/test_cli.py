"""The command line: help without torch, and a sentence with exit status 2 for a user's mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ferrovae.cli import COMMANDS, main


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "vae", "--help"], ["demo", "--help"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from ferrovae.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'triton', 'matplotlib', 'sklearn'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"ferrovae {name}" in shown for name, *_ in COMMANDS)


@pytest.mark.parametrize("command", ["train vae", "train vqvae", "evaluate", "sample", "info", "demo"])
def test_every_option_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: ferrovae {command} " in shown
    assert "(default: " in shown or "(required)" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("fly", "'fly' is not a command, expected one of train, evaluate, sample, info, demo, bench"),
        ("train", "'train' is not a command, expected train vae, train vqvae or train --resume RUN"),
        ("train gan --epochs 3", "'train gan' is not a command"),
        ("train vae --epochs 0", "epochs is 0, expected an integer of at least 1"),
        ("train vae --kl-warmup-epochs 30 --epochs 20", "longer than the 20 epochs"),
        ("train vae --device abacus", "device is 'abacus', expected 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("train vae --data no/such/place", "no/such/place"),
        ("train --resume no/such/run", "no/such/run is not a run: it has no config.json"),
        ("evaluate no/such/run", "no/such/run is not a run: it has no config.json"),
        ("sample no/such/run", "no/such/run is not a run: it has no config.json"),
        ("sample RUN --out samples.gif", "out is 'samples.gif', expected a name that ends in .png or .npy"),
        ("sample RUN --count 0", "count is 0, expected at least 1"),
        ("evaluate RUN --samples 0", "samples is 0, expected at least 1"),
        ("bench nothing", "'nothing' is not a benchmark, expected one of"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ferrovae: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["train vae --hiden 3", "train vae --hidden x", "sample", "info --what"])
def test_unknown_and_malformed_options(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert len(err) > 20


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERROVAE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="epochs is 0"):
        main(["train", "vae", "--epochs", "0"])


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import ferrovae.cli.info

    def broken(*_: object) -> int:
        raise AssertionError("ours")

    monkeypatch.setattr(ferrovae.cli.info, "main", broken)
    with pytest.raises(AssertionError, match="ours"):
        main(["info"])


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"reparameterize_kl", "nearest_code", "bernoulli_log_prob"} <= set(found["operations"])
    for backends in found["operations"].values():
        assert backends["reference"] is None
        assert backends["rust"] is None or "Rust" in backends["rust"] or "rust" in backends["rust"]
    assert found["machine"]["simd"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "nearest_code" in text
    reason = found["operations"]["nearest_code"]["triton"]
    assert reason is None or reason in text


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "ferrovae", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("ferrovae 0.")
