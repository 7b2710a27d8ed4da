"""The distribution of sign codes, summed over rows, and its gradient: tables of half the bits, and a matrix product.

N rows of d bits, contiguous. `tables_kernel` writes left [n, 2^(d//2)] and right [n, 2^(d - d//2)] of a chunk of rows;
torch multiplies them, on the hardware's matrix units where `torch.set_float32_matmul_precision` lets it.
`chain_kernel` takes the gradients in the tables back to the bits. Computed in float32, float64 for float64 x.
"""

import torch
import triton
import triton.language as tl

# Numbers of a chunk's two tables: 32 MiB in float32.
TABLES = 2**22
# Numbers of a tile: 8 for each thread of 4 warps.
TILE = 1024


@triton.jit
def _bit(x, row, alive, column, width, slope, work: tl.constexpr):
    """The probabilities that bit `column` is 0 and that it is 1, without cancellation: [BLOCK_N] each."""
    a = tl.load(x + row * width + column, mask=alive, other=0.0).to(work) * tl.load(slope).to(work)
    factor = tl.exp(-tl.abs(a))
    rare = factor / (1.0 + factor)
    common = 1.0 / (1.0 + factor)
    return tl.where(a > 0, rare, common), tl.where(a > 0, common, rare)


@triton.jit(do_not_specialize=["rows", "width", "first", "bits"])
def tables_kernel(
    x,
    mask,
    table,
    rows,
    width,
    first,
    bits,
    slope,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """table [N, 2^bits] of the bits from `first` on; rows that the mask leaves out are 0."""
    work = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    code = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    alive = row < rows
    taken = alive
    if mask is not None:
        taken = taken & (tl.load(mask + row, mask=alive, other=0) != 0)
    product = tl.zeros([BLOCK_N, BLOCK_C], work) + tl.where(taken, 1.0, 0.0).to(work)[:, None]
    for i in range(bits):
        zero, one = _bit(x, row, taken, first + i, width, slope, work)
        set_ = ((code >> (bits - 1 - i)) & 1) == 1
        product *= tl.where(set_[None, :], one[:, None], zero[:, None])
    codes = (tl.zeros([1], tl.int64) + 1) << bits
    where = row[:, None] * codes + code[None, :]
    tl.store(table + where, product, mask=alive[:, None] & (code[None, :] < codes))


@triton.jit(do_not_specialize=["rows", "width", "first", "bits"])
def chain_kernel(
    x,
    mask,
    table,
    grad,
    out,
    rows,
    width,
    first,
    bits,
    slope,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [N, d], from `first` on: slope (p0 S1 - p1 S0), Sb the sum of table o grad over the codes whose bit is b."""
    work = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    code = tl.arange(0, BLOCK_C)
    alive = row < rows
    taken = alive
    if mask is not None:
        taken = taken & (tl.load(mask + row, mask=alive, other=0) != 0)
    codes = (tl.zeros([1], tl.int64) + 1) << bits
    where = row[:, None] * codes + code[None, :]
    inside = taken[:, None] & (code[None, :] < codes)
    product = tl.load(table + where, mask=inside, other=0.0) * tl.load(grad + where, mask=inside, other=0.0)
    for i in range(bits):
        zero, one = _bit(x, row, taken, first + i, width, slope, work)
        set_ = (((code >> (bits - 1 - i)) & 1) == 1)[None, :]
        ones = tl.sum(tl.where(set_, product, 0.0), axis=1)
        zeros = tl.sum(tl.where(set_, 0.0, product), axis=1)
        value = tl.where(taken, (zero * ones - one * zeros) * tl.load(slope).to(work), 0.0)
        tl.store(out + row * width + first + i, value.to(out.dtype.element_ty), mask=alive)


def tile(codes: int) -> tuple[int, int]:
    """Rows and codes of a tile, powers of two."""
    block_c = min(512, triton.next_power_of_2(codes))
    return max(1, TILE // block_c), block_c


def _launch(
    kernel, x: torch.Tensor, mask: torch.Tensor | None, tensors: tuple, first: int, bits: int, slope: torch.Tensor
) -> None:
    rows, width = x.shape
    block_n, block_c = tile(2**bits)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(rows, block_n), triton.cdiv(2**bits, block_c))](
            x, mask, *tensors, rows, width, first, bits, slope,
            BLOCK_N=block_n, BLOCK_C=block_c, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _factor(x: torch.Tensor, slope: float) -> torch.Tensor:
    """The slope in memory: as an argument it would be rounded to float32."""
    return torch.full((1,), slope, dtype=torch.float64, device=x.device)


def _chunks(x: torch.Tensor, mask: torch.Tensor | None, slope: float, dtype: torch.dtype):
    """Rows, their mask, and their two tables, a chunk at a time."""
    bits = x.shape[1]
    halves = (bits // 2, bits - bits // 2)
    factor = _factor(x, slope)
    size = max(1, TABLES // (2 ** halves[0] + 2 ** halves[1]))
    # Interpreted and compiled alike, a mask is read as bytes.
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    for start in range(0, x.shape[0], size):
        rows = slice(start, start + size)
        part, chosen = x[rows], None if mask is None else mask[rows]
        tables = [torch.empty((part.shape[0], 2**half), dtype=dtype, device=x.device) for half in halves]
        _launch(tables_kernel, part, chosen, (tables[0],), 0, halves[0], factor)
        _launch(tables_kernel, part, chosen, (tables[1],), halves[0], halves[1], factor)
        yield rows, part, chosen, tables, halves, factor


def forward(x: torch.Tensor, mask: torch.Tensor | None, slope: float, dtype: torch.dtype) -> torch.Tensor:
    """The sum over the rows taken of their distributions, [2^d]; x contiguous."""
    total = torch.zeros(2 ** (x.shape[1] // 2), 2 ** (x.shape[1] - x.shape[1] // 2), dtype=dtype, device=x.device)
    for _, _, _, (left, right), _, _ in _chunks(x, mask, slope, dtype):
        total.addmm_(left.T, right)
    return total.flatten()


def backward(x: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor, slope: float) -> torch.Tensor:
    """The gradient in x of weights [2^d] times that sum; x and weights contiguous."""
    out = torch.empty_like(x)
    for rows, part, chosen, (left, right), halves, factor in _chunks(x, mask, slope, weights.dtype):
        factors = weights.view(left.shape[1], right.shape[1])
        arguments = ((left, right @ factors.T, 0, halves[0]), (right, left @ factors, *halves))
        for table, grad, first, bits in arguments:
            _launch(chain_kernel, part, chosen, (table, grad, out[rows]), first, bits, factor)
    return out


def aot_configurations() -> list[dict]:
    """What is launched: widths of tables, with and without a mask, the dtypes of x."""
    found = []
    for dtype, work, bits, mask in (
        ("fp32", "fp32", 8, None),
        ("bf16", "fp32", 9, "*u8"),
        ("fp16", "fp32", 1, None),
        ("fp64", "fp64", 9, "*u8"),
    ):
        block_n, block_c = tile(2**bits)
        pointers = {"x": f"*{dtype}", "mask": mask, "table": f"*{work}"}
        sizes = dict.fromkeys(("rows", "width", "first", "bits"), "i32") | {"slope": "*fp64"}
        for kernel, others in (
            ("chain_kernel", {"grad": f"*{work}", "out": f"*{dtype}"}),
            ("tables_kernel", {}),
        ):
            found.append(
                {
                    "kernel": kernel,
                    "name": f"{dtype} {block_n}x{block_c}",
                    "signature": pointers | others | sizes,
                    "constexprs": {"BLOCK_N": block_n, "BLOCK_C": block_c},
                    "num_warps": 4,
                }
            )
    return found
