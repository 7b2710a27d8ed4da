"""Front door of the Triton kernels: the repository's `kernels/` in a checkout, this package in a wheel."""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[3] / "kernels"
if _checkout.is_dir() and (_checkout.parent / "pyproject.toml").is_file():
    __path__ = [str(_checkout)]
