"""One index for d levels: digits in a mixed radix, the first the fastest. Arithmetic, so no table of prod(L) rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import require


def radix_buffers(layer: nn.Module, levels: Sequence[int], least: int = 2) -> None:
    """Give a layer the buffers `_levels` and `_basis`, (d,), outside its state_dict.

    They are int32 up to 2^31 codes and int64 beyond, and so are the indices.

    Raises:
        ValueError: there is no level, one is under `least`, or the codes exceed 2^63.
        TypeError: a level is not an integer.
    """
    require(layer, len(levels) > 0, "levels is empty, expected at least one number of levels")
    for level in levels:
        if not isinstance(level, int):
            raise TypeError(f"{type(layer).__name__}: levels is {list(levels)}, expected integers")
    require(layer, min(levels) >= least, f"levels is {list(levels)}, expected each to be at least {least}")
    size = prod(levels)
    require(layer, size <= 2**63, f"levels is {list(levels)}: {size} codes do not fit 64-bit indices")
    dtype = torch.int32 if size <= 2**31 else torch.int64
    basis = list(accumulate(levels[:-1], mul, initial=1))
    layer.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
    layer.register_buffer("_basis", torch.tensor(basis, dtype=dtype), persistent=False)


def digits_to_indices(digits: Tensor, basis: Tensor, size: int) -> Tensor:
    """Whole numbers of any dtype, (..., d) -> (...), sum_i digit_i prod_{j<i} L_j; 0 for a row with a NaN.

    size: prod_i L_i.
    """
    if digits.is_floating_point() and size <= 2**53:
        # whole numbers that a float holds exactly, and a NaN goes through the sum
        exact = torch.float32 if size <= 2**24 else torch.float64
        return (digits.to(exact) * basis).sum(dim=-1).nan_to_num(0.0).to(basis.dtype)
    indices = (digits.to(basis.dtype) * basis).sum(dim=-1, dtype=basis.dtype)
    if digits.is_floating_point():
        indices = indices.masked_fill(digits.sum(dim=-1).isnan(), 0)
    return indices


def indices_to_digits(indices: Tensor, levels: Tensor, basis: Tensor) -> Tensor:
    """(...) -> (..., d), integers in [0, L_i)."""
    return torch.div(indices[..., None], basis, rounding_mode="floor") % levels


def check_indices(layer: nn.Module, indices: Tensor, size: int, least: int = 0) -> None:
    """TypeError unless the indices are integers; on a CPU outside a graph also ValueError unless in [least, size).

    Elsewhere the look at their values would wait for the device.
    """
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"{type(layer).__name__}: indices is {indices.dtype}, expected an integer dtype")
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or indices.numel() == 0:
        return
    low, high = indices.min().item(), indices.max().item()
    require(layer, least <= low and high < size, f"indices run from {low} to {high}, expected {least} to {size - 1}")
