"""`code_sums` beside what people write: a one-hot matrix product, and `index_add_` with `bincount`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ferrovae import ops
from ferrovae.bench.case import Case, Work

SHAPES = [
    {"N": 65536, "K": 1024, "D": 64},
    {"N": 65536, "K": 1024, "D": 8},
    {"N": 32768, "K": 8192, "D": 256},
    {"N": 65536, "K": 16384, "D": 8},
    {"N": 8192, "K": 262144, "D": 18},
]
# Elements of the one-hot matrix, 12 bytes each: left out where a call would take seconds.
MOST_ONE_HOT = 2**26


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Codes at random, and all rows in one code; x [N, D] float32 -> sums [K, D], counts [K]."""
    rows, codes, dims = shape["N"], shape["K"], shape["D"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, dims, generator=generator).to(device)
    spread = torch.randint(codes, (rows,), generator=generator).to(device)
    for variant, indices in (("spread", spread), ("one code", torch.full_like(spread, codes // 2))):
        yield _case(shape, variant, x, indices, codes)


def _case(shape: dict[str, int], variant: str, x: Tensor, indices: Tensor, codes: int) -> Case:
    def index_add() -> tuple[Tensor, Tensor]:
        sums = torch.zeros(codes, x.shape[1], device=x.device).index_add_(0, indices, x)
        return sums, torch.bincount(indices, minlength=codes)

    def product() -> tuple[Tensor, Tensor]:
        hot = one_hot(indices, codes).float()
        return hot.T @ x, hot.sum(0)

    providers = {"ferrovae": lambda: ops.code_sums(x, indices, codes), "index_add_": index_add}
    if len(indices) * codes <= MOST_ONE_HOT:
        providers["one-hot product"] = product
    exact = torch.zeros(codes, x.shape[1], dtype=torch.float64).index_add_(0, indices.cpu(), x.double().cpu())
    size = torch.zeros(codes, x.shape[1], dtype=torch.float64).index_add_(0, indices.cpu(), x.double().abs().cpu())
    counts = torch.bincount(indices.cpu(), minlength=codes)

    def check(provider: str, result: object) -> bool:
        sums, numbers = (value.cpu().double() for value in cast(tuple[Tensor, Tensor], result))
        # Ours is rounded once; a running float32 sum loses a few units in the last place of what it adds.
        error = 2**-23 if provider == "ferrovae" else 2**-16
        return bool(torch.equal(numbers, counts.double()) and ((sums - exact).abs() <= error * size).all())

    promised = shape == SHAPES[0] and x.device.type == "cpu"
    bytes_ = x.numel() * 4 + indices.numel() * 8 + codes * (x.shape[1] + 1) * 4
    return Case(
        operation="code_sums",
        shape=shape,
        providers=providers,
        check=check,
        variant=variant,
        work=Work(bytes=bytes_, flops=x.numel()),
        targets={"one-hot product": 10.0, "index_add_": 1.5} if promised else {},
    )
