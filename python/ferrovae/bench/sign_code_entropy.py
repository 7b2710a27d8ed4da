"""`sign_code_entropy` beside the full softmax over 2^d codes, upstream's and a plain one in chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ferrovae import ops
from ferrovae.bench.case import Case, Work

SHAPES = [{"N": 4096, "d": 16}, {"N": 8192, "d": 10}, {"N": 512, "d": 18}]
# Numbers of the N x 2^d matrix that upstream keeps several of.
MOST_UPSTREAM = 2**28
INV_TEMPERATURE = 100.0

Entropies = tuple[Tensor, Tensor]
Result = tuple[float, float, Tensor]  # and the gradient


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """The loss (per-sample minus batch entropy) and its gradient in x [N, d] float32."""
    rows, bits = shape["N"], shape["d"]
    x = (torch.randn(rows, bits, generator=torch.Generator().manual_seed(0)) * 0.3).to(device)

    def full(function: Callable[[Tensor], Entropies]) -> Callable[[], Result]:
        def call() -> Result:
            leaf = x.clone().requires_grad_()
            per_sample, batch = function(leaf)
            (slope,) = torch.autograd.grad(per_sample - batch, leaf)
            return float(per_sample.detach()), float(batch.detach()), slope

        return call

    functions: dict[str, Callable[[Tensor], Entropies]] = {"ferrovae": ops.sign_code_entropy}
    upstream = _upstream(bits, device) if rows << bits <= MOST_UPSTREAM else None
    if upstream is not None:
        functions["vector-quantize-pytorch"] = upstream
    functions["softmax in chunks"] = _softmax_in_chunks

    @cache
    def truth() -> Result:
        return full(lambda leaf: _softmax_in_chunks(leaf.double()))()

    def check(provider: str, result: object) -> bool:
        # Upstream clamps probabilities at 1e-5, and so differs in the third digit.
        tolerance = 2e-2 if provider == "vector-quantize-pytorch" else 1e-4
        *values, slope = cast(Result, result)
        *exact, due = truth()
        near = all(abs(mine - value) <= tolerance * value for mine, value in zip(values, exact, strict=True))
        return near and bool((slope.double() - due.double()).norm() <= 10 * tolerance * due.double().norm())

    promised = shape == SHAPES[0] and device.type == "cpu"
    yield Case(
        operation="sign_code_entropy",
        shape=shape,
        providers={name: full(function) for name, function in functions.items()},
        check=check,
        mode="full",
        work=Work(bytes=4.0 * (3 * x.numel() + 2**bits), flops=6.0 * rows * 2**bits),
        targets={"vector-quantize-pytorch": 50.0} if promised else {},
        memory_limit=64 * 2**20 if promised else None,
        heavy=rows << bits > 2**22,
    )


def _upstream(bits: int, device: torch.device) -> Callable[[Tensor], Entropies] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantizers = import_module("vector_quantize_pytorch")
    except ImportError:
        return None
    layer = quantizers.LFQ(dim=bits, codebook_size=2**bits).to(device).train()

    def entropies(x: Tensor) -> Entropies:
        _, breakdown = layer(x.unsqueeze(0), inv_temperature=INV_TEMPERATURE, return_loss_breakdown=True)
        return breakdown.per_sample_entropy, breakdown.batch_entropy

    return entropies


def _codes(bits: int, like: Tensor) -> Tensor:
    numbers = torch.arange(2**bits, device=like.device).unsqueeze(-1)
    places = torch.arange(bits - 1, -1, -1, device=like.device)
    return ((numbers >> places) % 2 * 2 - 1).to(like.dtype)


def _softmax_in_chunks(x: Tensor) -> Entropies:
    """The definition, some rows at a time, each chunk computed again in the backward pass."""
    codes = _codes(x.shape[1], x)

    def chunk(rows: Tensor) -> Entropies:
        log_q = torch.log_softmax(2 * INV_TEMPERATURE * rows @ codes.T, -1)
        q = log_q.exp()
        return -(q * log_q).sum(), q.sum(0)

    total, mean = x.new_zeros(()), x.new_zeros(len(codes))
    for rows in x.split(max(1, 2**22 >> x.shape[1])):
        entropy, distribution = checkpoint(chunk, rows, use_reentrant=False)
        total, mean = total + entropy, mean + distribution
    mean = mean / len(x)
    return total / len(x), -torch.special.xlogy(mean, mean.clamp(min=1e-38)).sum()
