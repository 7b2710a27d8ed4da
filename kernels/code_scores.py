"""Distances of a tile of rows to a tile of codes, one dimension after the other: in difference form, so that neither a
common offset nor a row on a code costs digits. Vectors are stored [D, N] and [D, K], so that neighbours lie together.
"""

import triton
import triton.language as tl


@triton.jit
def distances(
    x,
    codes,
    n,
    k,
    rows,
    count,
    dims,
    DOT: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_K] of x [D, rows] at n int64 and codes [D, count] at k int64; -x.e with DOT."""
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    row_step, code_step = rows.to(tl.int64), count.to(tl.int64)
    x_place, code_place = x + n, codes + k
    for _ in range(dims):
        value = tl.load(x_place, mask=n < rows, other=0.0)[:, None]
        code = tl.load(code_place, mask=k < count, other=0.0)[None, :]
        if DOT:
            total -= value * code
        else:
            total += (value - code) * (value - code)
        x_place += row_step
        code_place += code_step
    if ROOT:
        total = tl.sqrt_rn(total)
    return total
