"""Where an element is: always in 64 bits. Sizes come as 32-bit integers, and their products do not fit those."""

import triton
import triton.language as tl


@triton.jit
def element(head, row, rows, width):
    """The first element of `row` of `head`, in a contiguous [heads, rows, width]; row may be a block."""
    return (tl.cast(head, tl.int64) * rows + row) * width
