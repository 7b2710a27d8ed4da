"""A training step of `nn.VectorQuantize` beside vector-quantize-pytorch's, default arguments."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ferrovae import nn
from ferrovae.bench._layer_step import MOST_NUMBERS, PEER, peer_class, steps
from ferrovae.bench.case import OURS, Case, Work

SHAPES: list[dict[str, int]] = [
    {"N": 8192, "K": 1024, "D": 64},
    {"N": 65536, "K": 1024, "D": 8},
    {"N": 16384, "K": 16384, "D": 8},  # LlamaGen
    {"N": 8192, "K": 8192, "D": 256},  # VQGAN
    {"N": 4096, "K": 262144, "D": 18},  # the peer would need 24 GiB
]
# Of the peer's CPU time, how many times ours.
_TARGETS = {(8192, 1024, 64): 10.0, (65536, 1024, 8): 30.0, (16384, 16384, 8): 80.0, (8192, 8192, 256): 6.0}


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Standard normal rows, and the codebook that both start from under one seed."""
    rows, codes, dims = (shape[letter] for letter in "NKD")
    x = torch.randn(1, rows, dims, generator=torch.Generator().manual_seed(rows + codes + dims)).to(device)
    ours = nn.VectorQuantize(dims, codes).to(device).train()
    layers: dict[str, torch.nn.Module] = {OURS: ours}
    peer = peer_class("VectorQuantize") if rows * codes <= MOST_NUMBERS else None
    if peer is not None:
        layers[PEER] = peer(dim=dims, codebook_size=codes).to(device).train()
        layers[PEER].load_state_dict(ours.state_dict())
    providers, check = steps(layers, x)
    yield Case(
        operation="vector_quantize",
        shape=shape,
        providers=providers,
        check=check,
        mode="full",
        work=Work(bytes=4.0 * (4 * rows * dims + 4 * codes * dims), flops=2.0 * rows * codes * dims),
        targets={PEER: _TARGETS[rows, codes, dims]} if (rows, codes, dims) in _TARGETS else {},
        memory_limit=4 * (3 * rows * dims + 3 * codes * dims) + 64 * 2**20 if device.type == "cpu" else None,
        heavy=rows * codes > 2**24,
    )
