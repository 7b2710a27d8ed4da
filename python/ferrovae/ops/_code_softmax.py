"""The softmax over codes a block at a time, and gradients through its scores: for every operation built on it.

One head: x [N, D], codes [K, D], bias [K], all finite or -infinity (`_codes.usable`), lse [N]. A block holds at most
`limit` numbers, whatever N and K are.

With scores s = -distance / temperature + bias, d s / d x = c (e - x) for the Euclidean distances and c e for `"dot"`,
where c is 1 / (temperature distance), 2 / temperature, 1 / temperature: so gradients are products of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ferrovae.ops import _codes, _rust, _triton

BLOCK = 1 << 19
_CODES = 1024


class Head(NamedTuple):
    """One head of an operation."""

    x: Tensor  # [N, D]
    codes: Tensor  # [K, D]
    bias: Tensor  # [K]
    lse: Tensor  # [N]
    temperature: Tensor  # []
    metric: str


class Block(NamedTuple):
    """Probabilities of some rows and some codes."""

    rows: slice
    codes: slice
    probabilities: Tensor  # [n, k]
    slopes: (
        Tensor  # [n, k]: what weights of scores are multiplied by; the probabilities, over the distance if Euclidean
    )


def limit(dtype: torch.dtype, backend: str) -> int:
    """Numbers of a block. Plain torch holds several float64 ones at once; a kernel holds three, so they may be larger,
    which repays launches and, on a CPU, the waits of torch's threads between products of matrices."""
    return BLOCK if backend == "reference" or dtype == torch.float64 else 4 * BLOCK


def row_slices(start: int, end: int, codes: int, size: int) -> Iterator[slice]:
    """Rows of blocks of at most `size` numbers that are `codes` wide, or as wide as a block is at most."""
    step = max(1, size // min(codes, _CODES))
    for first in range(start, end, step):
        yield slice(first, min(end, first + step))


def code_slices(codes: int) -> Iterator[slice]:
    """Codes of blocks."""
    for first in range(0, codes, _CODES):
        yield slice(first, min(codes, first + _CODES))


def logsumexp(x: Tensor, codes: Tensor, bias: Tensor, temperature: Tensor, metric: str, backend: str) -> Tensor:
    """log sum_k exp(s): x [H, N, D], codes [H, K, D], bias [H, K] -> [H, N]."""
    if backend == "rust" and x.dtype == torch.float32:
        out = torch.empty(x.shape[:2])
        spans = _rust.span(x), _rust.span(codes), _rust.span(bias)
        sizes = x.shape[0], x.shape[1], codes.shape[1], codes.shape[2]
        inverse = 1 / float(temperature)
        _rust.core.code_logsumexp(*spans, sizes, metric, inverse, _rust.span(out), _rust.threads())
        return out
    if backend == "triton" and x.dtype == torch.float32:
        return _triton.kernels("code_logsumexp").forward(x, codes, bias, temperature, metric)
    out = torch.empty(x.shape[:2], dtype=x.dtype, device=x.device)
    step = max(1, BLOCK // codes.shape[1])
    for head in range(x.shape[0]):
        exact = codes[head].double()
        for first in range(0, x.shape[1], step):
            far = _codes.distances(x[head, first : first + step].double(), exact, metric)
            out[head, first : first + step] = (bias[head] - far / temperature.double()).logsumexp(1)
    return out


def block(head: Head, rows: slice, codes: slice, backend: str) -> Block:
    """Probabilities exp(s - lse), 0 where the lse is not finite."""
    x, e, bias, lse = head.x[rows], head.codes[codes], head.bias[codes], head.lse[rows]
    if backend == "rust" and x.dtype == torch.float32:
        return Block(rows, codes, *_rust_block(x, e, bias, lse, head.temperature, head.metric))
    if backend == "triton" and x.dtype == torch.float32:
        kernels = _triton.kernels("code_logsumexp")
        return Block(rows, codes, *kernels.probabilities(x, e, bias, lse, head.temperature, head.metric))
    far = _codes.distances(x.double(), e.double(), head.metric)
    scores = bias - far / head.temperature.double()
    known = lse.isfinite().unsqueeze(1)
    p = torch.where(known, torch.exp(scores - lse.double().unsqueeze(1)), 0.0)
    slopes = torch.where(far > 0, p / far, 0.0) if head.metric == "euclidean" else p
    return Block(rows, codes, p.to(x.dtype), slopes.to(x.dtype))


def _rust_block(
    x: Tensor, e: Tensor, bias: Tensor, lse: Tensor, temperature: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    p = torch.empty(x.shape[0], e.shape[0])
    slopes = torch.empty(p.shape if metric == "euclidean" else 0)
    lse = lse.contiguous()
    spans = _rust.span(x), _rust.span(e), _rust.span(bias), _rust.span(lse)
    sizes = 1, p.shape[0], p.shape[1], x.shape[1]
    out = _rust.span(p), _rust.span(slopes)
    _rust.core.code_probabilities(*spans, sizes, metric, 1 / float(temperature), *out, _rust.threads())
    return p, slopes if metric == "euclidean" else p


def each_block(head: Head, start: int, end: int, backend: str) -> Callable[[], Iterable[Block]]:
    """What walks over all blocks of rows `start..end`, as often as it is called; a single one is computed once."""
    codes, size = head.codes.shape[0], limit(head.x.dtype, backend)
    plan = [(r, c) for c in code_slices(codes) for r in row_slices(start, end, codes, size)]
    if len(plan) == 1:
        single = block(head, *plan[0], backend)
        return lambda: [single]
    return lambda: (block(head, r, c, backend) for r, c in plan)


class Gradients:
    """Sums over blocks of weights times d score / d (x, codes, temperature); O(N D + K D) memory.

    Euclidean distances do not change when all vectors move together, so vectors are centred: sums of e - x then keep
    their digits. Distances are homogeneous, so the temperature's gradient follows from the others (Euler's theorem).
    """

    def __init__(self, head: Head) -> None:
        self._euclidean = head.metric in ("euclidean", "sqeuclidean")
        self._head = head
        self._x, self._codes = head.x, head.codes
        if self._euclidean:
            centre = head.codes.mean(0)
            self._x, self._codes = (
                torch.cat([vectors - centre, vectors.new_ones(vectors.shape[0], 1)], 1)
                for vectors in (head.x, head.codes)
            )
        self._of_x, self._of_codes = torch.zeros_like(self._x), torch.zeros_like(self._codes)

    def add(self, rows: slice, codes: slice, weights: Tensor) -> None:
        """Add a block of weights [n, k]: of the scores' gradients, times the block's slopes over its probabilities."""
        self._of_x[rows].addmm_(weights, self._codes[codes])
        self._of_codes[codes].addmm_(weights.mT, self._x[rows])

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in x [N, D], codes [K, D] and temperature []."""
        x, codes, of_x, of_codes = self._x, self._codes, self._of_x, self._of_codes
        if self._euclidean:
            # The column of ones summed the weights.
            x, codes = x[:, :-1], codes[:, :-1]
            of_x, of_codes = of_x[:, :-1] - of_x[:, -1:] * x, of_codes[:, :-1] - of_codes[:, -1:] * codes
        temperature, metric = self._head.temperature, self._head.metric
        factor = (2 if metric == "sqeuclidean" else 1) / temperature
        of_x, of_codes = of_x * factor, of_codes * factor
        of_temperature = temperature_gradient(x, codes, of_x, of_codes, temperature, metric)
        return of_x, of_codes, of_temperature


def temperature_gradient(
    x: Tensor, codes: Tensor, of_x: Tensor, of_codes: Tensor, temperature: Tensor, metric: str
) -> Tensor:
    """From the gradients in x and codes: sum w s = (x.dx + e.de) / m where s is homogeneous of degree m in them."""
    total = (x.double() * of_x).sum() + (codes.double() * of_codes).sum()
    return (total / (-temperature.double() * (1 if metric == "euclidean" else 2))).to(temperature.dtype)
