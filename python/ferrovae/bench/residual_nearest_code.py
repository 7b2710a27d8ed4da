"""`residual_nearest_code` beside what people use: addmm + argmin + gather stage by stage, vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ferrovae import ops
from ferrovae.bench.case import Case, Work

SHAPES: list[dict[str, int]] = [
    {"N": 4800, "K": 1024, "D": 128, "Q": 8},  # EnCodec
    {"N": 8192, "K": 1024, "D": 8, "Q": 9},  # DAC
    {"N": 2048, "K": 2048, "D": 256, "Q": 32},  # Mimi
    {"N": 2048, "K": 16384, "D": 256, "Q": 4},  # RQ-VAE, one codebook for all stages
    {"N": 8192, "K": 256, "D": 32, "Q": 3},  # TIGER
]
_SHARED = {(16384, 256, 4)}
# Of the CPU time of a peer, how many times ours; from the same shapes.
_PEER = "addmm + argmin + gather"
_TARGETS = {
    (4800, 1024, 128, 8): {_PEER: 1.5},
    (8192, 1024, 8, 9): {_PEER: 4.0},
    (2048, 2048, 256, 32): {_PEER: 1.3},
}


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Standard normal rows; codebooks that shrink from stage to stage, as what is left does."""
    rows, codes, dims, depth = (shape[letter] for letter in "NKDQ")
    generator = torch.Generator().manual_seed(rows + codes + dims + depth)
    shared = (codes, dims, depth) in _SHARED
    x = torch.randn(rows, dims, generator=generator).to(device)
    scales = 0.9 ** torch.arange(1 if shared else depth)
    codebooks = torch.randn(len(scales), codes, dims, generator=generator) * scales[:, None, None]
    codebooks = codebooks.to(device).expand(depth, codes, dims)
    providers: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "ferrovae": partial(ops.residual_nearest_code, x, codebooks),
        _PEER: partial(stage_by_stage, x, codebooks),
    }
    providers |= _vector_quantize_pytorch(x, codebooks)
    flops = 2 * rows * codes * dims * depth
    yield Case(
        operation="residual_nearest_code",
        shape=shape,
        providers=providers,
        check=partial(_right, x, codebooks),
        variant="one codebook" if shared else "",
        work=Work(bytes=4 * dims * (2 * rows + len(scales) * codes) + 8 * rows * depth, flops=flops),
        targets=_TARGETS.get((rows, codes, dims, depth), {}),
        heavy=flops > 2e10,
    )


def stage_by_stage(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """The usual recipe without the whole matrix: |e|^2 - 2 r.e in chunks of rows, argmin, gather, subtract."""
    chunk = max(1, 2**22 // codebooks.shape[1])
    residual, quantized, indices = x, torch.zeros_like(x), []
    for codebook in codebooks:
        squares = codebook.square().sum(1)
        parts = [torch.addmm(squares, part, codebook.T, alpha=-2).argmin(1) for part in residual.split(chunk)]
        indices.append(torch.cat(parts))
        code = codebook[indices[-1]]
        residual, quantized = residual - code, quantized + code
    return torch.stack(indices, 1), quantized


def _vector_quantize_pytorch(x: Tensor, codebooks: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """ResidualVQ in eval mode with the same codebooks."""
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError:
        return {}
    depth, codes, dims = codebooks.shape
    layer = ResidualVQ(dim=dims, num_quantizers=depth, codebook_size=codes).to(x.device).eval()
    for quantizer, codebook in zip(layer.layers, codebooks, strict=True):
        quantizer._codebook.embed.copy_(codebook[None])
    rows = x[None]

    @torch.no_grad()
    def quantize() -> tuple[Tensor, Tensor]:
        quantized, indices, *_ = layer(rows)
        return indices[0], quantized[0]

    return {"vector-quantize-pytorch": quantize}


def _right(x: Tensor, codebooks: Tensor, _: str, result: object) -> bool:
    """Whether, for some drawn rows, every index is the nearest code, in float64, of what its own stages before left."""
    if not isinstance(result, tuple):
        return False
    indices, quantized = (part.detach().cpu() for part in result)
    affordable = max(8, min(256, 2**28 // codebooks.numel(), len(x)))
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:affordable]
    residual = x.cpu()[some]
    total = torch.zeros_like(residual)
    for stage, codebook in enumerate(codebooks.cpu()):
        found, wide = indices[some, stage], codebook.double()
        chunk = max(1, 2**22 // codebook.numel())
        nearest = [(part[:, None] - wide).square_().sum(2).argmin(1) for part in residual.double().split(chunk)]
        if not torch.equal(torch.cat(nearest), found):
            return False
        residual, total = residual - codebook[found], total + codebook[found]
    return torch.allclose(quantized[some], total, rtol=1e-5, atol=1e-5)
