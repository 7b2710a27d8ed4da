"""What the benchmarks of the log-likelihoods share: eager torch and torch.compile of one formula, beside ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ferrovae.bench.case import Case, Work

Formula = Callable[..., Tensor]


def cases(
    operation: str,
    shape: Mapping[str, int],
    ours: Formula,
    formula: Formula,
    data: Tensor,
    parameters: tuple[Tensor, ...],
    targets: Mapping[str, float],
) -> Iterator[Case]:
    """Forward alone, then with the backward pass; the truth is `formula` in float64.

    `ours` and `formula` take the data, then the parameters.
    """
    compiled = None
    if data.device.type == "cuda" or any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        compiled = torch.compile(formula, dynamic=False)
    functions = {"ferrovae": ours, "torch eager": formula} | ({"torch.compile": compiled} if compiled else {})
    doubles = [value.double().requires_grad_() for value in parameters]
    truth = formula(data.double(), *doubles)
    slopes = torch.autograd.grad(truth.sum(), doubles)
    numbers = data.numel() + sum(value.numel() for value in parameters)

    def right(provider: str, found: object) -> bool:
        results = found if isinstance(found, tuple) else (found,)
        due = slopes if isinstance(found, tuple) else (truth.detach(),)
        return all(_close(one, two) for one, two in zip(results, due, strict=True))

    yield Case(
        operation,
        shape,
        {name: _forward(function, data, parameters) for name, function in functions.items()},
        right,
        work=Work(bytes=4.0 * (numbers + truth.numel())),
        targets={name: target for name, target in targets.items() if name in functions},
    )
    yield Case(
        operation,
        shape,
        {name: _full(function, data, parameters) for name, function in functions.items()},
        right,
        mode="full",
        work=Work(bytes=4.0 * (3 * numbers + 2 * truth.numel())),
    )


def _close(found: Tensor, due: Tensor) -> bool:
    """Within 1e-4 of the largest number there is: float32 code of the same formula gets there too."""
    return bool(((found.double() - due).abs() <= 1e-4 * due.abs().max()).all())


def _forward(function: Formula, data: Tensor, parameters: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(data, *parameters)

    return run


def _full(function: Formula, data: Tensor, parameters: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = [value.clone().requires_grad_() for value in parameters]

    def run() -> object:
        return torch.autograd.grad(function(data, *leaves).sum(), leaves)

    return run


def log_masses(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """What people write for a logistic's mass on one of 256 levels, exact too."""
    rate, half = torch.exp(-log_scale), 1 / 255
    above, below = (x - mean + half) * rate, (x - mean - half) * rate
    lowest, highest = -torch.nn.functional.softplus(-above), -torch.nn.functional.softplus(below)
    inside = lowest + highest + torch.log(-torch.expm1(-2 * half * rate))
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inside))


def levels(*shape: int, generator: torch.Generator) -> Tensor:
    """Random x on 256 levels of [-1, 1]."""
    return (torch.randint(0, 256, shape, generator=generator) * 2 - 255) / 255
