"""The inner products that a search on tensor cores decides by, written out: to measure their error, never to search.

x.e from three products of bfloat16 parts, summed in float32 in the order of `nearest_code`'s search. How tensor cores
align and truncate such sums is not documented; the error bound of the search assumes it, and this measures it.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "codes"])
def score_kernel(
    x_high,
    x_low,
    high,
    low,
    out,
    rows,
    codes,
    dims,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """x [N, D] and codes [K, D] as bfloat16 parts, D a multiple of BLOCK_D -> out float32 [N, K]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    alive, inside = (n < rows)[:, None], (k < codes)[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, dims, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        of_rows = n.to(tl.int64)[:, None] * dims + d[None, :]
        of_codes = k.to(tl.int64)[None, :] * dims + d[:, None]
        xh = tl.load(x_high + of_rows, mask=alive, other=0.0)
        xl = tl.load(x_low + of_rows, mask=alive, other=0.0)
        eh = tl.load(high + of_codes, mask=inside, other=0.0)
        el = tl.load(low + of_codes, mask=inside, other=0.0)
        if UPCAST:
            xh, xl, eh, el = xh.to(tl.float32), xl.to(tl.float32), eh.to(tl.float32), el.to(tl.float32)
        sums = tl.dot(xl, eh, sums, input_precision="ieee")
        sums = tl.dot(xh, el, sums, input_precision="ieee")
        sums = tl.dot(xh, eh, sums, input_precision="ieee")
    tl.store(out + n.to(tl.int64)[:, None] * codes + k[None, :], sums, mask=alive & inside)


def scores(x: torch.Tensor, codebook: torch.Tensor, upcast: bool = False) -> torch.Tensor:
    """float32 [N, K] of x [N, D] and codebook [K, D], float32.

    With `upcast` the products are taken of float32 operands with the same values, for Triton's interpreter.
    """
    width = triton.cdiv(x.shape[1], 16) * 16
    width = 16 if width == 16 else triton.cdiv(width, 32) * 32
    parts = []
    for tensor in (x, codebook):
        padded = torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
        high = padded.to(torch.bfloat16)
        parts += [high, (padded - high.float()).to(torch.bfloat16)]
    out = torch.empty((x.shape[0], codebook.shape[0]), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        score_kernel[(triton.cdiv(x.shape[0], 64), triton.cdiv(codebook.shape[0], 64))](
            *parts, out, *out.shape, width, BLOCK_N=64, BLOCK_K=64, BLOCK_D=min(width, 32), UPCAST=upcast,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def aot_configurations() -> list[dict]:
    """What is launched."""
    pointers = dict.fromkeys(("x_high", "x_low", "high", "low"), "*bf16") | {"out": "*fp32"}
    return [
        {
            "kernel": "score_kernel",
            "name": f"D{block}",
            "signature": pointers | dict.fromkeys(("rows", "codes", "dims"), "i32"),
            "constexprs": {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": block, "UPCAST": False},
            "num_warps": 8,
        }
        for block in (32, 16)
    ]
