"""One training step of a quantizer layer: forward in training mode, and the gradient of its input."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.bench.case import OURS

PEER = "vector-quantize-pytorch"
# Numbers of an N x K matrix, of which the peer keeps several.
MOST_NUMBERS = 2**28
_CHECKED_ROWS = 256

Step = Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]


def peer_class(name: str) -> Any | None:
    """A class of vector-quantize-pytorch; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(import_module("vector_quantize_pytorch"), name)
    except ImportError:
        return None


def step(layer: nn.Module, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized vectors, indices, loss, and the gradient of x under `slope`, that of the quantized vectors."""
    leaf = x.detach().requires_grad_()
    quantized, indices, loss = layer(leaf)[:3]
    total = loss.sum()
    (gradient,) = torch.autograd.grad((quantized, total), leaf, (slope, torch.ones_like(total)))
    return quantized.detach(), indices, total.detach(), gradient


def steps(layers: dict[str, nn.Module], x: Tensor) -> tuple[dict[str, Step], Callable[[str, object], bool]]:
    """A call for each layer, which trains on, and the check of a step from where the layer stood.

    The check: of some rows the codes are those a float64 search finds (but for near ties, where float32 may choose),
    the loss is finite, and a gradient came through.
    """
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    fresh = {name: copy.deepcopy(layer) for name, layer in layers.items()}

    def call(layer: nn.Module) -> Step:
        return lambda: step(layer, x, slope)

    def check(name: str, _: object) -> bool:
        layer = fresh[name]
        before = codebooks(layer)
        quantized, indices, loss, gradient = step(layer, x, slope)
        finite = all(bool(part.isfinite().all()) for part in (quantized, loss, gradient))
        return finite and bool(gradient.any()) and _right(x, indices, before, exact=name == OURS)

    return {name: call(layer) for name, layer in layers.items()}, check


def codebooks(layer: Any) -> list[Tensor]:
    """The codebook (K, D) of every stage, copied."""
    stages = getattr(layer, "layers", [layer])
    return [stage._codebook.embed[0].detach().clone() for stage in stages]


def _right(x: Tensor, indices: Tensor, books: list[Tensor], *, exact: bool) -> bool:
    """Of up to 256 rows: every stage's distance in float64 is the smallest; a peer may miss 1 row in 50, by
    rounding.
    """
    rows = x.reshape(-1, x.shape[-1])
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))[:_CHECKED_ROWS]
    residual = rows[chosen].double()
    found = indices.reshape(len(rows), -1)[chosen]
    wrong = 0
    for stage, book in enumerate(books):
        distances = torch.cdist(residual, book.double(), compute_mode="donot_use_mm_for_euclid_dist")
        mine = distances.gather(1, found[:, stage : stage + 1])[:, 0]
        wrong += int((mine > distances.amin(1) * (1 + 1e-12)).sum())
        residual = residual - book.double()[found[:, stage]]
    return wrong == 0 if exact and len(books) == 1 else wrong <= len(chosen) * len(books) // 50
