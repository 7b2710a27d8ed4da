"""Arithmetic on offsets beyond 2^31, without the gigabytes: the kernels' own helper on numbers that large."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from triton import language as tl

from ferrovae.kernels.offsets import element


@triton.jit
def store_offsets(out, first, rows, width, BLOCK: tl.constexpr):
    head = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    tl.store(out + head * BLOCK + lane, element(head, first + lane, rows, width))


@pytest.mark.parametrize(
    ("first", "rows", "width"), [(0, 7, 3), (2**20, 2**20 + 9, 2048), (5, 2**30, 1), (2**30, 2**30 + 4, 2**21)]
)
def test_offsets_are_right_beyond_32_bits(first, rows, width):
    heads, block = 3, 4
    out = torch.full((heads, block), -1, dtype=torch.int64)
    out = out.cuda() if torch.cuda.is_available() else out
    store_offsets[(heads,)](out, first, rows, width, BLOCK=block)
    assert out.tolist() == [[(head * rows + first + lane) * width for lane in range(block)] for head in range(heads)]
