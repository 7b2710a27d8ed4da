"""A training step of `nn.LFQ` beside vector-quantize-pytorch's, default arguments: exact entropies over 2^d codes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ferrovae import nn
from ferrovae.bench._layer_step import MOST_NUMBERS, PEER, peer_class, step
from ferrovae.bench.case import OURS, Case, Work

SHAPES: list[dict[str, int]] = [{"N": 4096, "d": 16}, {"N": 8192, "d": 10}, {"N": 16384, "d": 18}]


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Normal rows of d signs; the loss is the two entropies'."""
    rows, bits = shape["N"], shape["d"]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, rows, bits, generator=generator) * 0.3).to(device)
    slope = torch.randn(x.shape, generator=generator).to(device)
    layers: dict[str, torch.nn.Module] = {OURS: nn.LFQ(dim=bits, codebook_size=2**bits).to(device).train()}
    peer = peer_class("LFQ") if rows << bits <= MOST_NUMBERS else None
    if peer is not None:
        layers[PEER] = peer(dim=bits, codebook_size=2**bits).to(device).train()
    expected = ((x > 0).long() << torch.arange(bits - 1, -1, -1, device=device)).sum(-1)

    def check(_: str, result: object) -> bool:
        assert isinstance(result, tuple)
        quantized, indices, loss, gradient = result
        signs = torch.equal(quantized.sign(), torch.where(x > 0, 1.0, -1.0))
        finite = bool(loss.isfinite()) and bool(gradient.isfinite().all())
        return signs and finite and torch.equal(indices, expected)

    promised = shape == SHAPES[0] and device.type == "cpu"
    yield Case(
        operation="lfq",
        shape=shape,
        providers={name: partial(step, layer, x, slope) for name, layer in layers.items()},
        check=check,
        mode="full",
        work=Work(bytes=4.0 * (4 * x.numel() + 2**bits), flops=6.0 * rows * 2**bits),
        targets={PEER: 40.0} if promised else {},
        memory_limit=4 * 3 * x.numel() + 64 * 2**20 if promised else None,
        heavy=rows << bits > 2**22,
    )
