"""The operations' one door to the compiled extension."""

from __future__ import annotations

import torch

try:
    from ferrovae import _core as core
except ImportError as error:
    core = None  # type: ignore[assignment]
    _error: ImportError | None = error
else:
    _error = None

__all__ = ["core", "obstacle", "plain", "span", "threads"]


def obstacle() -> str | None:
    """Why the extension cannot be used; None when it can."""
    return (
        None
        if _error is None
        else f"the compiled extension is missing ({_error}); install the wheel or run `make test`"
    )


def plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor contiguous and of `dtype`; itself where it is, as most are: torch takes a microsecond to see that."""
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """What Rust borrows: the address and element count of a contiguous tensor, which the caller keeps alive."""
    return tensor.data_ptr(), tensor.numel()


def threads() -> int:
    """Threads an operation may use: torch's own setting."""
    return torch.get_num_threads()
