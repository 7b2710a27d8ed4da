"""The demo: replaces only what a demo made, and runs from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrovae.cli import main
from ferrovae.cli.demo import clear


def test_only_what_a_demo_made_is_removed(tmp_path: Path) -> None:
    clear(tmp_path / "absent")
    clear(tmp_path)
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="was not made by the demo; choose another --run-dir"):
        clear(run_dir)
    assert (run_dir / "config.json").exists()
    (run_dir / "made-by-demo").touch()
    (run_dir / "notes.txt").write_text("mine")
    clear(run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_demo_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    run_dir = tmp_path / "demo"
    for _ in range(2):
        assert main(["demo", "--run-dir", str(run_dir), "--epochs", "4", "--samples", "50"]) == 0
        last = capsys.readouterr().out.rstrip().splitlines()[-1]
        assert last == f"look at {run_dir / 'report.html'}"
        assert (run_dir / "report.html").stat().st_size > 10_000
        assert (run_dir / "vqvae" / "evaluation.json").is_file()
