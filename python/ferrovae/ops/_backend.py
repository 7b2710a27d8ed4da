"""Which backend an operation runs on: the user's choice, what is possible here, and why something is not."""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import TracebackType
from typing import Self

import torch

from ferrovae.ops import _rust, _triton

BACKENDS = ("auto", "reference", "rust", "triton")


class BackendWarning(UserWarning):
    """An operation runs on its slower reference because the backend meant for this device cannot."""


class _State:
    """The process-wide choice; an attribute, so that `torch.compile` guards on it."""

    name: str


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


state = _State()
state.name = _checked(os.environ.get("FERROVAE_BACKEND", "auto"), "FERROVAE_BACKEND")


class use_backend:  # noqa: N801 - reads as a verb, `with ferrovae.use_backend("reference"):`
    """Choose the backend of every operation, process-wide; as a context manager, until the block ends.

    Args:
        name: `"auto"` (Rust on a CPU, Triton on a GPU, else the reference), `"reference"` (plain torch),
            `"rust"` or `"triton"`. A forced backend that cannot run raises `RuntimeError` at the call.

    Raises:
        ValueError: the name is none of these.

    A backward pass uses the backend its forward used, whatever is chosen by then.
    """

    def __init__(self, name: str) -> None:
        self._previous = state.name
        state.name = _checked(name, "use_backend")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        state.name = self._previous


def obstacle(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on such a device in this process; None when it can."""
    if backend == "reference":
        return None
    if backend == "rust":
        if device_type != "cpu":
            return f"the Rust kernels run on cpu tensors, not on {device_type}"
        return _rust.obstacle()
    if device_type != "cuda" and not (device_type == "cpu" and _triton.interpreted()):
        return f"the Triton kernels run on cuda tensors, not on {device_type}"
    return _triton.obstacle()


@cache
def resolve(
    operation: str,
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    dtypes: tuple[tuple[str, frozenset[torch.dtype]], ...],
) -> str:
    """The backend that runs `operation`: `backend`, or what `"auto"` means here.

    `dtypes` lists the backends the operation has beside its reference, with the element types each takes. A kernel
    that exists and cannot run is warned of; an operation without one for this device was written to run on its
    reference there.
    """
    supported = dict(dtypes)

    def reason(candidate: str) -> str | None:
        if candidate == "reference":
            return None
        if candidate not in supported:
            return f"it has no {candidate} kernel"
        if dtype not in supported[candidate]:
            return f"its {candidate} kernel does not take {dtype}"
        return obstacle(candidate, device_type)

    if backend != "auto":
        why = reason(backend)
        if why is not None:
            raise RuntimeError(f"{operation}: backend {backend!r} was asked for but cannot run: {why}")
        return backend
    native = {"cpu": "rust", "cuda": "triton"}.get(device_type, "reference")
    if native != "reference" and native not in supported:
        return "reference"
    why = reason(native)
    if why is None:
        return native
    warnings.warn(f"{operation} runs on its plain-torch reference: {why}", BackendWarning, stacklevel=2)
    return "reference"
