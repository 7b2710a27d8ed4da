"""The wheel and the sdist, each installed into a clean environment outside the repository; and the dependency floor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | (env or {})
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def build(kind: str, folder: Path) -> Path:
    pytest.importorskip("maturin", reason="maturin is not installed")
    if shutil.which("cargo") is None:
        pytest.skip("cargo is not installed")
    arguments = ["build", "--release", "--locked"] if kind == "wheel" else ["sdist"]
    run(sys.executable, "-m", "maturin", *arguments, "--out", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist"))


def clean_environment(folder: Path, *requirements: str | Path) -> Path:
    """A fresh virtual environment with these installed; returns its interpreter."""
    uv = Path(sys.executable).with_name("uv")
    python = folder / "environment" / "bin" / "python"
    if uv.is_file():
        run(uv, "venv", "-q", "--python", sys.executable, folder / "environment", cwd=folder)
        run(uv, "pip", "install", "-q", "--python", python, *requirements, cwd=folder)
    else:
        run(sys.executable, "-m", "venv", folder / "environment", cwd=folder)
        run(python, "-m", "pip", "install", "-q", *requirements, cwd=folder)
    return python


def smoke(python: Path, level: str, folder: Path) -> str:
    script = shutil.copy(SMOKE, folder)
    plain = run(python, script, level, cwd=folder)
    interpreted = run(python, script, "operations", cwd=folder, env={"TRITON_INTERPRET": "1"})
    assert "rust: agrees" in plain
    assert "triton: agrees" in interpreted
    assert str(ROOT) not in plain
    return plain


def test_wheel_holds_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        kernels = {name for name in names if name.startswith("ferrovae/kernels/")}
        expected = {f"ferrovae/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
        assert kernels == expected | {"ferrovae/kernels/__init__.py"}
        for name in expected:
            assert archive.read(name) == (ROOT / "kernels" / Path(name).name).read_bytes()
    assert {"ferrovae/py.typed", "ferrovae/_core.pyi", "ferrovae/_core.abi3.so"} <= names
    documents = {Path(name).name for name in names}
    assert {"LICENSE-MIT", "LICENSE-APACHE", "THIRD_PARTY.md", "CHANGELOG.md", "CITATION.cff"} <= documents
    assert {name.split("/")[0] for name in names} <= {"ferrovae", wheel.name.split("-cp")[0] + ".dist-info"}
    assert wheel.stat().st_size <= 6 * 2**20
    assert "abi3" in wheel.name


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    python = clean_environment(tmp_path, f"{wheel}[demo]")
    assert "trained three steps" in smoke(python, "all", tmp_path)


def test_sdist_works_in_a_clean_environment(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        documents = {Path(name).name for name in archive.getnames()}
    assert {"LICENSE-MIT", "LICENSE-APACHE", "THIRD_PARTY.md", "CHANGELOG.md", "CITATION.cff", "Makefile"} <= documents
    python = clean_environment(tmp_path, f"ferrovae[demo] @ {sdist.as_uri()}")
    assert "trained three steps" in smoke(python, "all", tmp_path)


def test_operations_work_on_the_dependency_floor(wheel: Path, tmp_path: Path) -> None:
    floor = ["torch==2.7.0", "numpy==1.26.*", "safetensors==0.4.5"]
    python = clean_environment(tmp_path, wheel, *floor)
    assert "torch 2.7.0" in smoke(python, "operations", tmp_path)
