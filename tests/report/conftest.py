"""Two small trained runs to report on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def train(run_dir: Path, *arguments: str) -> Path:
    command = [sys.executable, "-m", "ferrovae", "train", *arguments, "--run-dir", str(run_dir), "--max-steps", "40"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return run_dir


@pytest.fixture(scope="session")
def vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "vae", "vae", "--hidden", "32", "--latent-dim", "4")


@pytest.fixture(scope="session")
def vqvae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "vqvae", "vqvae", "--codebook-size", "16", "--width", "8")
