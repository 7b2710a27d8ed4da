"""`nearest_code` is the float64 argmin, row for row, where float32 alone would go wrong; and stays small in memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import nearest_code

# Offset in standard deviations, standard deviation, dtype of the rows.
DATA = [
    (offset, scale, dtype)
    for offset in (0, 100, 1000)
    for scale in (1.0, 1e-5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
SMALL = [(300, 500, 8), (130, 257, 32), (70, 129, 300)]
TABLE = [
    (65536, 1024, 8), (16384, 16384, 8), (4096, 4096, 32), (8192, 1024, 64), (4800, 1024, 128), (8192, 8192, 256),
    (4096, 262144, 18),
]  # fmt: skip


def inputs(shape: tuple[int, int, int], offset: float, scale: float, dtype: torch.dtype):
    n, k, d = shape
    x = ((torch.randn(n, d) + offset) * scale).to(dtype)
    codebook = (torch.randn(k, d) + offset) * scale
    # A twentieth of the codes are copies, and as many rows are codes.
    codebook[-max(1, k // 20) :] = codebook[: max(1, k // 20)]
    x[: n // 20] = codebook[torch.randint(k, (n // 20,))].to(dtype)
    return x, codebook


def truth(x: torch.Tensor, codebook: torch.Tensor) -> np.ndarray:
    """The definition, for every row: among the codes that a float64 matrix product leaves, d by d."""
    rows, codes = x.double().numpy(), codebook.double().numpy()
    mean = codes.mean(0)
    centred = codes - mean
    squares = (centred * centred).sum(1)
    chunk = max(1, 2**22 // len(codes))
    found = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        away = part - mean
        scores = squares - 2 * away @ centred.T
        # Far more than what the product's rounding can amount to.
        slack = 1e-12 * len(mean) * ((away * away).sum(1) + squares.max())
        row, code = np.nonzero(scores <= scores.min(1, keepdims=True) + slack[:, None])
        distance = np.zeros(len(row))
        for d in range(len(mean)):
            difference = part[row, d] - codes[code, d]
            distance += difference * difference
        first = np.searchsorted(row, np.arange(len(part)))
        least = np.minimum.reduceat(distance, first)
        found.append(np.minimum.reduceat(np.where(distance == least[row], code, len(codes)), first))
    return np.concatenate(found)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize(("offset", "scale", "dtype"), DATA)
def test_every_row_of_small_searches(shape, offset, scale, dtype):
    x, codebook = inputs(shape, offset, scale, dtype)
    expected = truth(x, codebook)
    for backend in ("rust", "reference"):
        with use_backend(backend):
            np.testing.assert_array_equal(nearest_code(x, codebook).numpy(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", TABLE)
@pytest.mark.parametrize(("offset", "scale", "dtype"), DATA)
def test_every_row_at_the_sizes_of_models(shape, offset, scale, dtype):
    n, k, d = shape
    # Brute force costs 2 N K D in float64: some thousand rows of the largest searches stand for all.
    x, codebook = inputs((min(n, max(256, 2**34 // (k * d))), k, d), offset, scale, dtype)
    np.testing.assert_array_equal(nearest_code(x, codebook).numpy(), truth(x, codebook))


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_every_code_the_same(metric):
    x = torch.randn(100, 20) * 1e-3 + 50
    codebook = torch.full((300, 20), 50.0)
    assert (nearest_code(x, codebook, metric=metric) == 0).all()
    assert torch.equal(nearest_code(x, codebook, metric=metric, topk=32), torch.arange(32).expand(100, 32))


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_topk_agrees_with_a_stable_sort_where_codes_repeat(metric):
    x, codebook = torch.randn(70, 6).round(), torch.randn(400, 6).round()
    found = {}
    for backend in ("rust", "reference"):
        with use_backend(backend):
            found[backend] = nearest_code(x, codebook, metric=metric, topk=32)
    assert torch.equal(found["rust"], found["reference"])


MEMORY = """
import resource, sys, torch
from ferrovae.ops import nearest_code
n, k, d, topk, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
x, codebook = torch.randn(n, d), torch.randn(k, d)
codebook[k // 2 :] = codebook[: k - k // 2]
nearest_code(x[:8], codebook[:64], topk=topk)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest_code(x, codebook, topk=topk)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def kibibytes(*sizes: int) -> int:
    """What a search adds to the largest resident size of a process of its own."""
    command = [sys.executable, "-c", MEMORY, *map(str, sizes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_search_takes_little_memory():
    # Half of the codes are copies: every row is decided in float64, too.
    assert kibibytes(64, 2**18, 18, 1, 8) < 2**16


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4096, 2**18, 18, 1, 2), (32, 2**20, 8, 32, 8), (2**17, 2**15, 4, 1, 2)])
def test_no_search_takes_much_memory(sizes):
    n, k, d, topk, _ = sizes
    assert kibibytes(*sizes) < 2**16 + (8 * n * topk + 8 * k * d) // 1024


@pytest.mark.slow
def test_more_scores_than_32_bits_can_count():
    x, codebook = torch.randn(2**17, 2), torch.randn(2**15, 2)
    found = nearest_code(x, codebook)
    some = torch.randint(2**17, (500,))
    some[0] = 2**17 - 1
    np.testing.assert_array_equal(found[some].numpy(), truth(x[some], codebook))
