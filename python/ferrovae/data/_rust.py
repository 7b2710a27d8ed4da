"""The loader's one door to the compiled extension."""

from __future__ import annotations

import torch

try:
    from ferrovae._core import DataError, Pipeline, idx_read, idx_shape, npy_header
except ImportError as error:
    raise ImportError(
        f"ferrovae.data needs the compiled extension ({error}); install the wheel or run `make test`"
    ) from error

__all__ = ["DataError", "Pipeline", "idx_read", "idx_shape", "npy_header", "span"]


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """What Rust borrows: the address and element count of a contiguous tensor, which the caller keeps alive."""
    return tensor.data_ptr(), tensor.numel()
