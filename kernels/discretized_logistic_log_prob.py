"""Discretised logistic log-likelihood, and its gradients: each number is read once, nothing is stored between.

R rows of D columns, all tensors contiguous; x has as many rows, or a divisor n of R: row r meets row r mod n. A program
holds a tile of about 1024 elements: several short rows, or a piece of a long one, whose partial sums a second, ordered
pass adds up. Computed in float32, float64 for float64 means.
"""

import torch
import triton
import triton.language as tl

from .logistic import ends, level, log_mass, slopes

TILE = 1024
_VARIES = ["rows", "x_rows", "top"]


@triton.jit
def _tile(x, mean, log_scale, rows, x_rows, columns, top, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's rows int64 [BLOCK_N], offsets and mask [BLOCK_N, BLOCK_D], and the parts of the masses there."""
    pieces = tl.cdiv(columns, BLOCK_D)
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = program % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * columns + column[None, :]
    x_offsets = (row % x_rows)[:, None] * columns + column[None, :]
    work = tl.float64 if mean.dtype.element_ty == tl.float64 else tl.float32
    scale = tl.load(log_scale + offsets, mask=inside, other=0.0).to(work)
    centre = tl.load(mean + offsets, mask=inside, other=0.0).to(work)
    highest = tl.zeros([BLOCK_N, BLOCK_D], work) + top
    v = level(tl.load(x + x_offsets, mask=inside, other=0.0).to(work), highest)
    n = 2.0 * v - highest
    # Rounded once: at a scale of exp(-7) rounding T mean alone would cost 7e-5 nats.
    lower, upper = tl.fma(-centre, highest, n - 1.0), tl.fma(-centre, highest, n + 1.0)
    return row, program % pieces, pieces, offsets, inside, v, lower, upper, scale, highest


@triton.jit(do_not_specialize=_VARIES)
def forward_kernel(x, mean, log_scale, out, rows, x_rows, columns, top, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [R, pieces of a row]: sums of log masses."""
    row, piece, pieces, _, inside, v, lower, upper, scale, highest = _tile(
        x, mean, log_scale, rows, x_rows, columns, top, BLOCK_N, BLOCK_D
    )
    a, b, width, _ = ends(lower, upper, scale, highest)
    total = tl.sum(tl.where(inside, log_mass(v, a, b, width, scale, highest), 0.0), axis=1)
    tl.store(out + row * pieces + piece, total, mask=row < rows)


@triton.jit(do_not_specialize=_VARIES)
def backward_kernel(
    x,
    mean,
    log_scale,
    grad,
    d_mean,
    d_log_scale,
    rows,
    x_rows,
    columns,
    top,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_mean, d_log_scale [R, D]: grad times the derivatives."""
    row, _, _, offsets, inside, v, lower, upper, scale, highest = _tile(
        x, mean, log_scale, rows, x_rows, columns, top, BLOCK_N, BLOCK_D
    )
    a, b, width, rate = ends(lower, upper, scale, highest)
    of_mean, of_scale = slopes(v, a, b, width, rate, highest)
    weight = tl.load(grad + row, mask=row < rows, other=0.0)[:, None]
    tl.store(d_mean + offsets, (weight * of_mean).to(d_mean.dtype.element_ty), mask=inside)
    tl.store(d_log_scale + offsets, (weight * of_scale).to(d_log_scale.dtype.element_ty), mask=inside)


def tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, powers of two."""
    block_d = min(TILE, triton.next_power_of_2(max(columns, 16)))
    return TILE // block_d, block_d


def _launch(kernel, tensors: tuple[torch.Tensor, ...], columns: int, levels: int) -> None:
    x, mean = tensors[:2]
    rows = mean.numel() // columns
    block_n, block_d = tile(columns)
    with torch.cuda.device_of(mean):
        kernel[(-(-rows // block_n) * -(-columns // block_d),)](
            *tensors,
            rows,
            x.numel() // columns,
            columns,
            levels - 1,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )


def forward(
    x: torch.Tensor,
    mean: torch.Tensor,
    log_scale: torch.Tensor,
    levels: int,
    batch: torch.Size,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Log-likelihoods of shape `batch`; all contiguous."""
    if mean.numel() == 0:
        return torch.zeros(batch, dtype=dtype, device=mean.device)
    columns = mean.numel() // batch.numel()
    pieces = -(-columns // tile(columns)[1])
    out = torch.empty((batch.numel(), pieces), dtype=dtype, device=mean.device)
    _launch(forward_kernel, (x, mean, log_scale, out), columns, levels)
    return (out if pieces == 1 else out.sum(1)).view(batch)


def backward(
    x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, grad: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in mean and log_scale; all contiguous, one number `grad` a row."""
    d_mean, d_log_scale = torch.empty_like(mean), torch.empty_like(mean)
    if mean.numel():
        tensors = x, mean, log_scale, grad, d_mean, d_log_scale
        _launch(backward_kernel, tensors, mean.numel() // grad.numel(), levels)
    return d_mean, d_log_scale


def aot_configurations() -> list[dict]:
    """The configurations shipped, for the ahead-of-time tests."""
    configurations = []
    for columns in (3072, 1, 784):
        for kind, result in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
            block_n, block_d = tile(columns)
            pointers = {"x": f"*{kind}", "mean": f"*{kind}", "log_scale": f"*{kind}"}
            counts = {"rows": "i32", "x_rows": "i32", "columns": "i32", "top": "i32"}
            gradients = {"grad": f"*{result}", "d_mean": f"*{kind}", "d_log_scale": f"*{kind}"}
            for kernel, others in (("forward_kernel", {"out": f"*{result}"}), ("backward_kernel", gradients)):
                configurations.append(
                    {
                        "kernel": kernel,
                        "name": f"{kind} {block_n}x{block_d}",
                        "signature": pointers | others | counts,
                        "constexprs": {"BLOCK_N": block_n, "BLOCK_D": block_d},
                        "num_warps": 4,
                    }
                )
    return configurations
