"""`code_logsumexp` beside the N x K softmax that people write, and its own reference in chunks of plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ferrovae import ops
from ferrovae.bench.case import Case, Work

SHAPES: list[dict[str, int]] = [
    {"N": 8192, "K": 1024, "D": 64},
    {"N": 65536, "K": 1024, "D": 8},
    {"N": 2048, "K": 16384, "D": 8},
    {"N": 2048, "K": 8192, "D": 256},
]
_MATRIX_LIMIT = 2**29  # bytes of N x K that a provider may hold
_CHECKED_ROWS = 64
_TEMPERATURE = 0.5


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Standard normal rows and codes; the full mode differentiates the sum in both."""
    rows, codes, dims = shape["N"], shape["K"], shape["D"]
    generator = torch.Generator().manual_seed(rows + codes + dims)
    x = torch.randn(rows, dims, generator=generator).to(device)
    codebook = torch.randn(codes, dims, generator=generator).to(device)
    scores = float(rows) * codes
    for mode in ("forward", "full"):
        run = _forward if mode == "forward" else _full
        providers = {"ferrovae": run(ours, x, codebook)}
        if 4 * scores <= _MATRIX_LIMIT:
            providers["eager"] = run(eager, x, codebook)
        providers["reference"] = run(reference, x, codebook)
        products = 1 if mode == "forward" else 4
        yield Case(
            operation="code_logsumexp",
            shape=shape,
            providers=providers,
            check=_check(x, codebook, mode),
            mode=mode,
            work=Work(bytes=4.0 * products * dims * (rows + codes), flops=2 * products * scores * dims),
            targets={"reference": 1.0},
            memory_limit=2**26,
            heavy=products * scores * dims > 1e10,
        )


def ours(x: Tensor, codebook: Tensor) -> Tensor:
    """The operation."""
    return ops.code_logsumexp(x, codebook, _TEMPERATURE)


def eager(x: Tensor, codebook: Tensor) -> Tensor:
    """All N x K scores at once."""
    return (-torch.cdist(x, codebook) / _TEMPERATURE).logsumexp(1)


def reference(x: Tensor, codebook: Tensor) -> Tensor:
    """Ours, on plain torch."""
    with ops.use_backend("reference"):
        return ours(x, codebook)


def _forward(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, codebook: Tensor) -> Callable[[], object]:
    return lambda: function(x, codebook)


def _full(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, codebook: Tensor) -> Callable[[], object]:
    leaves = x.clone().requires_grad_(), codebook.clone().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value.sum(), leaves)

    return run


def _check(x: Tensor, codebook: Tensor, mode: str) -> Callable[[str, object], bool]:
    """Some rows' values and gradients in float64; of the codebook's gradient the sum, which is minus that of x's."""
    some = torch.linspace(0, x.shape[0] - 1, _CHECKED_ROWS, device=x.device).long()
    part = x[some].double().requires_grad_()
    truth = (-(part.unsqueeze(1) - codebook.double()).square().sum(2).sqrt() / _TEMPERATURE).logsumexp(1)
    (slope,) = torch.autograd.grad(truth.sum(), part)

    def check(_: str, result: object) -> bool:
        value, *gradients = result if isinstance(result, tuple) else (result,)
        right = torch.allclose(value[some].double(), truth.detach(), rtol=1e-5, atol=1e-4)
        if mode == "full":
            of_x, of_codes = (gradient.double() for gradient in gradients)
            right &= torch.allclose(of_x[some], slope, rtol=1e-3, atol=1e-4)
            right &= torch.allclose(of_codes.sum(0), -of_x.sum(0), rtol=1e-3, atol=1e-6 * x.shape[0])
        return bool(right)

    return check
