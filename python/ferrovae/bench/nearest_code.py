"""`nearest_code` beside what people use: faiss, addmm + argmin in chunks of rows, cdist + argmin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from ferrovae import ops
from ferrovae.bench.case import Case, Work

SHAPES: list[dict[str, int]] = [
    {"N": 65536, "K": 1024, "D": 8},  # DAC, pre-tokenising
    {"N": 16384, "K": 16384, "D": 8},  # LlamaGen
    {"N": 4096, "K": 4096, "D": 32},  # VAR
    {"N": 8192, "K": 1024, "D": 64},
    {"N": 4800, "K": 1024, "D": 128},  # EnCodec
    {"N": 8192, "K": 8192, "D": 256},  # VQGAN
    {"N": 4096, "K": 262144, "D": 18},  # the size of Open-MAGVIT2's codebook
    {"N": 32768, "K": 8192, "D": 3},  # Stable Diffusion, VQ-f4
    {"N": 8192, "K": 32768, "D": 4},  # Emu3
    {"N": 4800, "K": 4096, "D": 512},  # WavTokenizer
    {"N": 75, "K": 1024, "D": 128},  # few rows: one stage of a second of EnCodec
    {"N": 13, "K": 2048, "D": 256},  # few rows: one stage of a second of Mimi
]
# Of the CPU time of a peer, how many times ours; from the same shapes.
_TARGETS = {
    (65536, 1024, 8): {"faiss": 1.0, "addmm + argmin": 6.0},
    (16384, 16384, 8): {"faiss": 1.15, "addmm + argmin": 15.0},
    (4096, 4096, 32): {"faiss": 1.4, "addmm + argmin": 3.5},
    (8192, 1024, 64): {"faiss": 1.25, "addmm + argmin": 1.7},
    (4800, 1024, 128): {"faiss": 1.2, "addmm + argmin": 1.4},
    (8192, 8192, 256): {"faiss": 1.1, "addmm + argmin": 1.9},
    (4096, 262144, 18): {"faiss": 5.0},
}
# Of the measured peak of multiply-adds, with one thread.
_ROOF_TARGETS = {(8192, 1024, 64): 0.75, (4800, 1024, 128): 0.80, (8192, 8192, 256): 0.85}
_MATRIX_LIMIT = 2**30  # bytes of N x K that a provider may hold
_CHECKED_ROWS = 256


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Standard normal rows and codes, with as many threads as targets are given for, and with one."""
    rows, codes, dims = shape["N"], shape["K"], shape["D"]
    generator = torch.Generator().manual_seed(rows + codes + dims)
    x = torch.randn(rows, dims, generator=generator).to(device)
    codebook = torch.randn(codes, dims, generator=generator).to(device)
    providers: dict[str, Callable[[], Tensor]] = {"ferrovae": partial(ops.nearest_code, x, codebook)}
    if device.type == "cpu":
        providers |= _faiss(x, codebook)
    providers["addmm + argmin"] = partial(addmm_argmin, x, codebook)
    if 4 * rows * codes <= _MATRIX_LIMIT:
        providers["cdist + argmin"] = lambda: torch.cdist(x, codebook).argmin(1)
    work = Work(bytes=4 * dims * (rows + codes) + 8 * rows, flops=2 * rows * codes * dims)
    check = _check(x, codebook)
    for threads in (2, 1) if device.type == "cpu" else (1,):
        yield Case(
            operation="nearest_code",
            shape=shape,
            providers=providers if threads == 2 or device.type != "cpu" else {"ferrovae": providers["ferrovae"]},
            check=check,
            variant="one thread" if device.type == "cpu" and threads == 1 else "",
            work=work,
            targets=_TARGETS.get((rows, codes, dims), {}) if threads == 2 else {},
            roof_target=_ROOF_TARGETS.get((rows, codes, dims)) if device.type == "cpu" and threads == 1 else None,
            memory_limit=2**26,
            threads=threads,
            heavy=work.flops > 2e10,
        )


def addmm_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    """The usual recipe without the whole matrix: |e|^2 - 2 x.e in chunks of rows, argmin."""
    squares = codebook.square().sum(1)
    chunk = max(1, 2**22 // codebook.shape[0])
    return torch.cat([torch.addmm(squares, part, codebook.T, alpha=-2).argmin(1) for part in x.split(chunk)])


def _faiss(x: Tensor, codebook: Tensor) -> dict[str, Callable[[], Tensor]]:
    """An exact index, built once: adding the codes only copies them."""
    try:
        import faiss
    except ImportError:
        return {}
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = x.numpy()

    def search() -> Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        return torch.from_numpy(index.search(rows, 1)[1][:, 0])

    return {"faiss": search}


def _check(x: Tensor, codebook: Tensor) -> Callable[[str, object], bool]:
    """Every row where that is affordable, else some drawn ones, by differences in float64."""

    @cache
    def truth() -> tuple[Tensor, Tensor]:
        rows, codes = x.double().cpu(), codebook.double().cpu()
        every = rows.shape[0] * codes.numel() <= 2**28
        generator = torch.Generator().manual_seed(0)
        some = torch.arange(len(rows)) if every else torch.randperm(len(rows), generator=generator)[:_CHECKED_ROWS]
        chunk = max(1, 2**22 // codes.numel())
        nearest = [(part[:, None] - codes).square_().sum(2).argmin(1) for part in rows[some].split(chunk)]
        return some, torch.cat(nearest)

    def right(_: str, result: object) -> bool:
        some, nearest = truth()
        return isinstance(result, Tensor) and torch.equal(result.cpu()[some], nearest)

    return right
