"""What the benchmarks of the log-likelihoods share: forward and full cases, checked against float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ferrovae.bench.case import Case, Work

SIZES = [{"N": 240, "D": 784}, {"N": 240, "D": 3072}]


def compared(
    operation: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    shape: Mapping[str, int],
    variant: str = "",
    targets: Mapping[str, float] | None = None,
) -> Iterator[Case]:
    """The operation `(x, *parameters)` beside what people write, alone and with the gradients in the parameters.

    `targets` are promises for the operation alone, with two threads.
    """
    functions = {"ferrovae": operation, "eager": eager}
    if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        functions["torch.compile"] = torch.compile(eager, dynamic=False)
    double = x.double() if x.is_floating_point() else x
    exact = [parameter.double().requires_grad_() for parameter in parameters]
    value = eager(double, *exact)
    truth = [value.detach(), *torch.autograd.grad(value.sum(), exact)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in (x, *parameters))
    leaves = [parameter.clone().requires_grad_() for parameter in parameters]

    def forward(function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [function(x, *parameters)]

    def full(function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            result = function(x, *leaves)
            return [result, *torch.autograd.grad(result.sum(), leaves)]

        return run

    def check(provider: str, results: object) -> bool:
        # Of the largest row's sum, or gradient: the usual formulas lose digits that ours keep.
        tolerance = 1e-5 if provider == "ferrovae" else 1e-3
        pairs = zip(results, truth, strict=False)  # type: ignore[call-overload]
        return all(
            bool(((mine.double() - due).abs() <= tolerance * (due.abs().amax() + 1e-6)).all()) for mine, due in pairs
        )

    for threads in (1, 2):
        for mode, run, work in (("forward", forward, size), ("full", full, 3 * size)):
            yield Case(
                operation=operation.__name__,
                shape=shape,
                providers={name: run(function) for name, function in functions.items()},
                check=check,
                mode=mode,
                variant=variant,
                work=Work(bytes=float(work)),
                threads=threads,
                targets=(targets or {}) if (mode, threads) == ("forward", 2) else {},
            )
