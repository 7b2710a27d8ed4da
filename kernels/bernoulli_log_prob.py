"""Bernoulli log-likelihood of logits, and its gradient: each logit is read once, nothing is stored between.

R rows of D columns, both tensors contiguous; x has as many rows, or a divisor n of R: row r meets row r mod n, so x is
not repeated for several samples. A program holds a tile of about 2048 elements, 16 for each thread of 4 warps: several
short rows, or a piece of a long one, whose partial sums a second, ordered pass adds up. Computed in float32, float64
for float64 logits.
"""

import torch
import triton
import triton.language as tl

TILE = 2048
_VARIES = ["rows", "x_rows"]


@triton.jit
def _tile(logits, x, rows, x_rows, columns, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's rows int64 [BLOCK_N], its piece of them, offsets and mask [BLOCK_N, BLOCK_D], logits and error.

    error = x - [l > 0]: x l - max(l, 0) = error l, and x - sigmoid(l) = error +- sigmoid(-|l|), without cancellation.
    """
    pieces = tl.cdiv(columns, BLOCK_D)
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = program % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * columns + column[None, :]
    x_offsets = (row % x_rows)[:, None] * columns + column[None, :]
    work = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    logit = tl.load(logits + offsets, mask=inside, other=0.0).to(work)
    value = tl.load(x + x_offsets, mask=inside, other=0).to(work)
    error = value - tl.where(logit > 0, 1.0, 0.0).to(work)
    return row, program % pieces, pieces, offsets, inside, logit, error


@triton.jit(do_not_specialize=_VARIES)
def forward_kernel(logits, x, out, rows, x_rows, columns, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [R, pieces of a row]: sums of error l - log(1 + exp(-|l|))."""
    row, piece, pieces, _, inside, logit, error = _tile(logits, x, rows, x_rows, columns, BLOCK_N, BLOCK_D)
    linear = tl.where(error == 0, 0.0, error * logit)  # 0 times infinity is 0 here
    factor = tl.exp(-tl.abs(logit))
    shifted = 1.0 + factor
    rest = tl.log(shifted) - ((shifted - 1.0) - factor) / shifted  # log1p(factor): puts back what 1 + factor lost
    total = tl.sum(tl.where(inside, linear - rest, 0.0), axis=1)
    tl.store(out + row * pieces + piece, total, mask=row < rows)


@triton.jit(do_not_specialize=_VARIES)
def backward_kernel(logits, x, grad, out, rows, x_rows, columns, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [R, D]: grad (x - sigmoid(l))."""
    row, _, _, offsets, inside, logit, error = _tile(logits, x, rows, x_rows, columns, BLOCK_N, BLOCK_D)
    factor = tl.exp(-tl.abs(logit))
    rest = factor / (1.0 + factor)
    slope = error + tl.where(logit > 0, rest, -rest)
    weight = tl.load(grad + row, mask=row < rows, other=0.0)
    tl.store(out + offsets, (weight[:, None] * slope).to(out.dtype.element_ty), mask=inside)


def tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, powers of two."""
    block_d = min(TILE, triton.next_power_of_2(max(columns, 16)))
    return TILE // block_d, block_d


def _launch(kernel, logits: torch.Tensor, x: torch.Tensor, tensors: tuple[torch.Tensor, ...], columns: int) -> None:
    rows = logits.numel() // columns
    block_n, block_d = tile(columns)
    with torch.cuda.device_of(logits):
        kernel[(-(-rows // block_n) * -(-columns // block_d),)](
            logits,
            x,
            *tensors,
            rows,
            x.numel() // columns,
            columns,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )


def forward(logits: torch.Tensor, x: torch.Tensor, batch: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Log-likelihoods of shape `batch`; logits and x contiguous."""
    rows = batch.numel()
    columns = logits.numel() // rows if rows else 0
    if logits.numel() == 0:
        return torch.zeros(batch, dtype=dtype, device=logits.device)
    pieces = -(-columns // tile(columns)[1])
    out = torch.empty((rows, pieces), dtype=dtype, device=logits.device)
    _launch(forward_kernel, logits, x, (out,), columns)
    return (out if pieces == 1 else out.sum(1)).view(batch)


def backward(logits: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradients in the logits; all contiguous, one number `grad` a row."""
    out = torch.empty_like(logits)
    if out.numel():
        _launch(backward_kernel, logits, x, (grad, out), logits.numel() // grad.numel())
    return out


def aot_configurations() -> list[dict]:
    """The configurations shipped, for the ahead-of-time tests."""
    configurations = []
    for columns in (784, 1, 3072):
        for logits, x, result in (("fp32", "fp32", "fp32"), ("bf16", "u8", "fp32"), ("fp64", "fp64", "fp64")):
            block_n, block_d = tile(columns)
            pointers = {"logits": f"*{logits}", "x": f"*{x}"}
            counts = {"rows": "i32", "x_rows": "i32", "columns": "i32"}
            for kernel, others in (
                ("forward_kernel", {"out": f"*{result}"}),
                ("backward_kernel", {"grad": f"*{result}", "out": f"*{logits}"}),
            ):
                configurations.append(
                    {
                        "kernel": kernel,
                        "name": f"{logits} {block_n}x{block_d}",
                        "signature": pointers | others | counts,
                        "constexprs": {"BLOCK_N": block_n, "BLOCK_D": block_d},
                        "num_warps": 4,
                    }
                )
    return configurations
