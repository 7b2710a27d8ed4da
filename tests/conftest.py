"""Fixtures that every room's tests share.

Without a GPU, Triton's interpreter is on in the test process, so `use_backend("triton")` runs the kernels on cpu
tensors. An interpreted kernel cannot be compiled: the ahead-of-time tests compile in a process of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Two processes share the tests; threads of each that wait for the other's would cost more than they bring.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def mnist() -> Path:
    """The folder of the four MNIST IDX files; the test is skipped where it is absent."""
    root = Path(os.environ.get("FERROVAE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (root / "mnist").is_dir():
        pytest.skip(f"no MNIST under {root} (set FERROVAE_TEST_DATA)")
    return root / "mnist"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `torch.empty` and `torch.empty_like` return NaN (or the largest integer), so that unwritten outputs show."""

    def poisoned(original):
        def allocate(*args, **kwargs):
            tensor = original(*args, **kwargs)
            if tensor.device.type != "meta":
                tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
            return tensor

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
