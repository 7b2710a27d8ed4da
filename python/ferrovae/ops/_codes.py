"""Rows, codes and a temperature as the soft code operations share them: checks, layout, what is left out.

H heads, N rows, K codes, D dimensions. The operations under the public ones know float32 and float64 and three
distances: the cosine distance is 1 - x.e of unit vectors, so it is `"dot"` there.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from ferrovae.ops import _checks
from ferrovae.ops._registry import Operation
from ferrovae.ops.nearest_code_distances import METRICS

KERNEL_DTYPES = frozenset({torch.float32, torch.float64})


def arguments(operation: str, x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """x as [H, N, D] and the codebook as [H, K, D], checked, both in the dtype that is computed in."""
    _checks.floating(operation, "x", x)
    _checks.floating(operation, "codebook", codebook)
    _checks.choice(operation, "metric", metric, METRICS)
    _checks.same_device(operation, "codebook", codebook, "x", x)
    if codebook.ndim not in (2, 3):
        raise ValueError(
            f"{operation}: codebook is {_checks.shape(codebook)}, expected (K, D), or (H, K, D) with heads"
        )
    heads = codebook.ndim == 3
    if x.ndim < codebook.ndim - 1 or x.shape[-1] == 0:
        leading = "H, ..., D" if heads else "..., D"
        raise ValueError(f"{operation}: x is {_checks.shape(x)}, expected ({leading}) with D >= 1")
    if codebook.shape[-1] != x.shape[-1] or (heads and codebook.shape[0] != x.shape[0]):
        expected = f"({x.shape[0]}, K, {x.shape[-1]})" if heads else f"(K, {x.shape[-1]})"
        raise ValueError(
            f"{operation}: codebook is {_checks.shape(codebook)}, expected {expected} to match x {_checks.shape(x)}"
        )
    if codebook.numel() == 0:
        raise ValueError(f"{operation}: codebook is {_checks.shape(codebook)}, expected at least one code")
    work = torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32
    codes = codebook.to(work) if heads else codebook.to(work).unsqueeze(0)
    return x.to(work).reshape(codes.shape[0], -1, x.shape[-1]), codes


def temperature(operation: str, value: float | Tensor, like: Tensor, *, zero: bool = False) -> Tensor:
    """A temperature as a tensor [] like `like`; positive, or with `zero` also 0. A tensor's value is not looked at."""
    if isinstance(value, Tensor):
        _checks.floating(operation, "temperature", value)
        _checks.same_device(operation, "temperature", value, "x", like)
        if value.numel() != 1:
            raise ValueError(f"{operation}: temperature is {_checks.shape(value)}, expected one number")
        return value.to(like.dtype).reshape(())
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{operation}: temperature is a {type(value).__name__}, expected a number or a tensor")
    if not ((value >= 0 if zero else value > 0) and value < math.inf):
        expected = "0 or a positive number" if zero else "a positive number"
        raise ValueError(f"{operation}: temperature is {value}, expected {expected}")
    return torch.full((), value, dtype=like.dtype, device=like.device)


def prepared(
    operation: str, x: Tensor, codebook: Tensor, temperature_value: float | Tensor, metric: str
) -> tuple[Tensor, Tensor, Tensor, str]:
    """x [H, N, D], codebook [H, K, D], temperature [] and the metric of an operation under a public one."""
    rows, codes = arguments(operation, x, codebook, metric)
    scale = temperature(operation, temperature_value, rows)
    if metric == "cosine":
        return unit(rows), unit(codes), scale, "dot"
    return rows, codes, scale, metric


def positive(operation: str, value: Tensor) -> None:
    """On a CPU, where looking is free, a temperature tensor that is not positive is a `ValueError`."""
    if value.device.type == "cpu" and not float(value) > 0:
        raise ValueError(f"{operation}: temperature is {float(value)}, expected a positive number")


def differentiable_once(gradient: Operation) -> None:
    """Make second derivatives through a backward operation an error instead of silently zero."""

    def refuse(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"{gradient.name.removesuffix('_backward')}: differentiable once, second derivatives were asked for"
        )

    gradient.register_autograd(refuse, lambda ctx, inputs, output: None)


def unit(vectors: Tensor) -> Tensor:
    """vectors / |vectors|; zero vectors stay zero, with gradient 0."""
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    scaled = vectors / torch.where(zero, 1.0, largest)  # so that no square overflows or vanishes
    length = scaled.square().sum(-1, keepdim=True)
    return torch.where(zero, 0.0, scaled / torch.where(zero, 1.0, length).sqrt())


def usable(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and codebook with 0 for rows and codes that are not finite; which rows are, [H, N]; the codes' bias [H, K].

    The bias is 0, or -infinity for a code that is not finite: it has probability 0.
    """
    rows, codes = x.isfinite().all(-1), codebook.isfinite().all(-1)
    bias = torch.zeros(codes.shape, dtype=x.dtype, device=x.device).masked_fill_(~codes, -torch.inf)
    clean = torch.where(rows.unsqueeze(-1), x, 0.0), torch.where(codes.unsqueeze(-1), codebook, 0.0)
    return clean[0].contiguous(), clean[1].contiguous(), rows, bias


def distances(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """The meaning: x [n, D], codes [k, D] float64 -> [n, k]; Euclidean ones in difference form."""
    if metric == "dot":
        return -(x @ codes.mT)
    far = torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist")
    return far if metric == "euclidean" else far.square_()
