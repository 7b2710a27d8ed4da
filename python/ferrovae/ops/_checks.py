"""Argument checks that the operations share; every message names the function, the argument, what came, what is due."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape(tensor: Tensor) -> str:
    """A shape as it is written in a message: `(3, 4)`."""
    return str(tuple(tensor.shape))


def tensor(operation: str, name: str, value: Any) -> Tensor:
    """`value`, which must be a tensor, or `TypeError`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operation}: {name} is a {type(value).__name__}, expected a tensor")
    return value


def floating(operation: str, name: str, value: Any) -> Tensor:
    """`value`, which must be a tensor of a dtype that the operations compute with, or `TypeError`."""
    if tensor(operation, name, value).dtype not in FLOATS:
        raise TypeError(f"{operation}: {name} is {value.dtype}, expected float32, float64, bfloat16 or float16")
    return value


def alike(operation: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype (`TypeError`) and same device (`ValueError`)."""
    if value.dtype != other.dtype:
        raise TypeError(f"{operation}: {name} is {value.dtype}, expected {other.dtype} to match {other_name}")
    same_device(operation, name, value, other_name, other)


def same_device(operation: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same device, or `ValueError`."""
    if value.device != other.device:
        raise ValueError(f"{operation}: {name} is on {value.device}, expected {other.device}, where {other_name} is")


def broadcasts(operation: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` expands to `other`'s shape, or `ValueError`."""
    extra = other.ndim - value.ndim
    if extra < 0 or any(mine not in (1, due) for mine, due in zip(value.shape, other.shape[extra:], strict=True)):
        raise ValueError(
            f"{operation}: {name} is {shape(value)}, expected a shape that broadcasts to {other_name} {shape(other)}"
        )


def choice(operation: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of a few names, or `ValueError`."""
    if value not in choices:
        raise ValueError(f"{operation}: {name} is {value!r}, expected one of {', '.join(choices)}")


def seed(operation: str, value: Tensor | int | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The key of an operation's random numbers, int64 [1] on `device`.

    A given one as it is; without one a fresh draw from `generator`, or from torch's own generator of that device, so
    that `torch.manual_seed`, checkpointing and CUDA graphs treat it like any random number of torch.
    """
    if value is None:
        limits = torch.iinfo(torch.int64)
        return torch.randint(limits.min, limits.max, (1,), dtype=torch.int64, device=device, generator=generator)
    if generator is not None:
        raise ValueError(f"{operation}: seed and generator are both given, expected at most one")
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{operation}: seed is {value.dtype}, expected int64")
        if value.numel() != 1:
            raise ValueError(f"{operation}: seed is {shape(value)}, expected (1,)")
        return value.detach().reshape(1).to(device)
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{operation}: seed is a {type(value).__name__}, expected an int64 tensor (1,) or an int")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{operation}: seed is {value}, expected a signed 64-bit integer")
    return torch.full((1,), value, dtype=torch.int64, device=device)
