"""A training step of `nn.ResidualVQ` beside vector-quantize-pytorch's, default arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ferrovae import nn
from ferrovae.bench._layer_step import PEER, peer_class, steps
from ferrovae.bench.case import OURS, Case, Work

SHAPES: list[dict[str, int]] = [
    {"N": 4800, "K": 1024, "D": 128, "Q": 8},  # EnCodec
    {"N": 8192, "K": 1024, "D": 8, "Q": 9},  # DAC
    {"N": 2048, "K": 2048, "D": 256, "Q": 32},  # Mimi
]
# Of the peer's CPU time, how many times ours.
_TARGETS = {(4800, 1024, 128, 8): 4.5, (8192, 1024, 8, 9): 15.0, (2048, 2048, 256, 32): 4.0}


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Standard normal rows, and codebooks that both start from, smaller from stage to stage as what is left is."""
    rows, codes, dims, depth = (shape[letter] for letter in "NKDQ")
    x = torch.randn(1, rows, dims, generator=torch.Generator().manual_seed(rows + depth)).to(device)
    options: dict[str, Any] = {"dim": dims, "num_quantizers": depth, "codebook_size": codes}
    ours = nn.ResidualVQ(**options).to(device).train()
    with torch.no_grad():
        for stage, layer in enumerate(ours.layers):
            layer.codebook = torch.randn(codes, dims, generator=torch.Generator().manual_seed(stage)) * 0.9**stage
    layers: dict[str, torch.nn.Module] = {OURS: ours}
    peer = peer_class("ResidualVQ")
    if peer is not None:
        layers[PEER] = peer(**options).to(device).train()
        layers[PEER].load_state_dict(ours.state_dict())
    providers, check = steps(layers, x)
    size = 3 * rows * dims + 3 * depth * codes * dims
    yield Case(
        operation="residual_vq",
        shape=shape,
        providers=providers,
        check=check,
        mode="full",
        work=Work(bytes=4.0 * 4 * (rows + depth * codes) * dims, flops=2.0 * rows * codes * dims * depth),
        targets={PEER: _TARGETS[rows, codes, dims, depth]} if (rows, codes, dims, depth) in _TARGETS else {},
        memory_limit=4 * size + 64 * 2**20 if device.type == "cpu" else None,
        heavy=True,
    )
