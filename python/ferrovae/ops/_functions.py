"""Differentiable calls of an operation without `torch.library`'s autograd layer.

That layer takes longer than a small operation, and does not work under `torch.func`'s transforms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

Function = type[torch.autograd.Function]
_Call = Callable[..., Any]


def needs_gradient(args: tuple[Any, ...]) -> bool:
    """Whether an argument requires a gradient."""
    return any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def has_tangent(args: tuple[Any, ...]) -> bool:
    """Whether forward-mode derivatives are asked for."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args)


def no_forward_mode(name: str) -> NotImplementedError:
    """What such a call raises: torch would take the derivatives for zeros."""
    return NotImplementedError(
        f"{name} has no forward-mode derivative: use reverse mode (torch.func.jacrev, torch.func.vjp)"
    )


def eager(name: str, run: _Call, backward: _Call, setup: _Call) -> Function:
    """A function for calls outside of all transforms."""

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = run(*args)
        setup(ctx, args, output)
        return output

    return _function(name, forward=forward, backward=backward)


def functional(name: str, run: _Call, backward: _Call, setup: _Call, rule: _Call) -> Function:
    """A function for calls under `torch.func`'s transforms; `rule` is its `vmap`."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(name)

    return _function(name, forward=run, setup_context=setup, backward=backward, jvp=jvp, vmap=rule)


def one_by_one(run: _Call, size: int, dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """`vmap` by a call for every member of the batch."""
    calls = [
        run(*(arg if dim is None else arg.select(dim, call) for arg, dim in zip(args, dims, strict=True)))
        for call in range(size)
    ]
    if isinstance(calls[0], torch.Tensor):
        return torch.stack(calls), 0
    results = tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
    return results, (0,) * len(results)


def _function(name: str, **methods: _Call) -> Function:
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
