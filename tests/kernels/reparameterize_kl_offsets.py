"""A kernel that writes down which elements a tile of `reparameterize_kl` would touch, in tensors of any size."""

import triton
import triton.language as tl

from ferrovae.kernels.reparameterize_kl import _offsets, _tile


@triton.jit
def probe(
    out,
    out_elements,
    tile,
    columns,
    inner,
    row_stride,
    segment_stride,
    SEGMENTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The offsets of moments with these strides, and of the elements of z: int64 [BLOCK_N, BLOCK_D]."""
    rows, cols, _, segment, place, _, _ = _tile(tile, columns, inner, SEGMENTED, BLOCK_N, BLOCK_D)
    at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(out + at, _offsets(rows, segment, place, row_stride, segment_stride, SEGMENTED))
    tl.store(out_elements + at, rows[:, None] * columns + cols[None, :])
