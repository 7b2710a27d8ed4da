"""The operations' one door to Triton: imported on first use, never by `import ferrovae`."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on cpu tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def obstacle() -> str | None:
    """Why the Triton kernels cannot be used; None when they can."""
    return None if find_spec("triton") is not None else "triton is not installed (pip install 'ferrovae[triton]')"


@cache
def kernels(operation: str) -> ModuleType:
    """The module `kernels/<operation>.py`."""
    return import_module(f"ferrovae.kernels.{operation}")
