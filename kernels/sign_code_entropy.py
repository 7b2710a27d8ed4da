"""Entropies of independent bits, summed, and their gradient: each number is read once.

N rows of d bits, contiguous, seen as N d numbers: a program takes 2048 of them, 16 for each thread of 4 warps, and a
second, ordered pass adds the programs' sums. Computed in float32, float64 for float64 x.
"""

import torch
import triton
import triton.language as tl

TILE = 2048


@triton.jit
def _bits(x, mask, total, width, slope, TILE: tl.constexpr):
    """Offsets, which are inside, which are taken, |a| and exp(-|a|), a = slope x."""
    work = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < total
    taken = inside
    if mask is not None:
        taken = taken & (tl.load(mask + at // width, mask=inside, other=0) != 0)
    a = tl.load(x + at, mask=taken, other=0.0).to(work) * tl.load(slope).to(work)
    return at, inside, taken, a, tl.exp(-tl.abs(a))


@triton.jit(do_not_specialize=["total", "width"])
def forward_kernel(x, mask, out, total, width, slope, TILE: tl.constexpr):
    """out [programs]: sums of log(1 + f) + |a| f / (1 + f), f = exp(-|a|)."""
    _, _, taken, a, factor = _bits(x, mask, total, width, slope, TILE)
    shifted = 1.0 + factor
    rest = tl.log(shifted) - ((shifted - 1.0) - factor) / shifted  # log1p(factor): puts back what 1 + factor lost
    entropy = rest + tl.where(factor == 0.0, 0.0, tl.abs(a) * factor) / shifted
    tl.store(out + tl.program_id(0), tl.sum(tl.where(taken, entropy, 0.0), axis=0))


@triton.jit(do_not_specialize=["total", "width"])
def backward_kernel(x, mask, grad, out, total, width, slope, TILE: tl.constexpr):
    """out: -grad slope a f / (1 + f)^2."""
    at, inside, taken, a, factor = _bits(x, mask, total, width, slope, TILE)
    shifted = 1.0 + factor
    derivative = -tl.where(factor == 0.0, 0.0, a * factor) / (shifted * shifted)
    value = tl.where(taken, tl.load(grad) * tl.load(slope).to(a.dtype) * derivative, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def _launch(kernel, x: torch.Tensor, mask: torch.Tensor | None, tensors: tuple, slope: float) -> None:
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    # In memory: as an argument it would be rounded to float32.
    factor = torch.full((1,), slope, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(x.numel(), TILE),)](
            x, mask, *tensors, x.numel(), x.shape[1], factor, TILE=TILE, num_warps=4, enable_fp_fusion=True
        )


def forward(x: torch.Tensor, mask: torch.Tensor | None, slope: float, dtype: torch.dtype) -> torch.Tensor:
    """The sum of the entropies of all bits of the rows taken, []; x contiguous."""
    out = torch.empty(triton.cdiv(x.numel(), TILE), dtype=dtype, device=x.device)
    if x.numel():
        _launch(forward_kernel, x, mask, (out,), slope)
    return out.sum()


def backward(x: torch.Tensor, mask: torch.Tensor | None, grad: torch.Tensor, slope: float) -> torch.Tensor:
    """The gradient in x of grad [] times that sum; x contiguous."""
    out = torch.empty_like(x)
    if x.numel():
        _launch(backward_kernel, x, mask, (grad, out), slope)
    return out


def aot_configurations() -> list[dict]:
    """What is launched: both kernels, with and without a mask, the dtypes of x."""
    found = []
    for dtype, work, mask in (("fp32", "fp32", None), ("bf16", "fp32", "*u8"), ("fp64", "fp64", "*u8")):
        sizes = {"total": "i32", "width": "i32", "slope": "*fp64"}
        for kernel, others in (
            ("forward_kernel", {"out": f"*{work}"}),
            ("backward_kernel", {"grad": f"*{work}", "out": f"*{dtype}"}),
        ):
            found.append(
                {
                    "kernel": kernel,
                    "name": dtype,
                    "signature": {"x": f"*{dtype}", "mask": mask} | others | sizes,
                    "constexprs": {"TILE": TILE},
                    "num_warps": 4,
                }
            )
    return found
