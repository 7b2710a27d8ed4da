"""Sign codes and their numbers: a bit says whether an entry of the code is positive, the first bit most significant."""

from __future__ import annotations

import torch
from torch import Tensor

# The numbers are int64, of which one bit is the sign.
MOST_BITS = 62
# A table of all codes is made only where it is small: 2^18 codes of 18 float32 are 18 MiB.
MOST_BITS_OF_A_TABLE = 18


def bit_values(bits: int) -> Tensor:
    """2^(d - 1), ..., 2, 1: (d,) int64."""
    return 2 ** torch.arange(bits - 1, -1, -1)


def indices_of_bits(bits: Tensor, values: Tensor) -> Tensor:
    """(..., d) bool -> (...) int64."""
    return torch.where(bits, values, 0).sum(dim=-1)


def bits_of_indices(indices: Tensor, values: Tensor) -> Tensor:
    """(...) int64 -> (..., d) bool."""
    return (indices[..., None].to(torch.int64) & values) != 0


def all_bits(values: Tensor) -> Tensor:
    """The bits of every number in order: (2^d, d) bool."""
    return bits_of_indices(torch.arange(2 ** values.shape[0], device=values.device), values)
