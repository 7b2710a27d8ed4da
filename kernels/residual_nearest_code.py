"""Residual quantization: at every stage the certified search of `nearest_code` on what is left, then one subtraction.

Few, narrow rows go through all stages on chip instead: `residual_nearest_code_fused`.

G groups of N rows, Q stages of K codes, D dimensions. All codebooks are prepared by one launch; a stage is a few more,
without host synchronisation: the search, the float64 decision of the rows it left open (so that the next stage starts
from exact indices), and `advance_kernel`, which subtracts the chosen codes, adds them up and writes the results.
"""

import torch
import triton
import triton.language as tl

from . import residual_nearest_code_fused as fused
from .nearest_code import search
from .nearest_code_prepared import prepare

_ROWS = 32


@triton.jit(do_not_specialize=["total", "rows", "size", "stage", "depth"])
def advance_kernel(
    residual,
    quantized,
    codes,
    codebook,
    chosen,
    indices,
    limits,
    total,
    rows,
    size,
    dims,
    stage,
    depth,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """residual, quantized [G * N, D] go one stage further by codebook [G, K, D] and chosen [G * N].

    Writes this stage of indices [G * N, Q] and, unless None, of codes [G * N, Q, D]; rows whose limits [G * N] they
    have reached get -1 and zeros.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    alive = n < total
    reached = alive
    if limits is not None:
        reached = alive & (tl.load(limits + n, mask=alive, other=0) > stage)
    k = tl.load(chosen + n, mask=reached, other=-1)
    tl.store(indices + n * depth + stage, k, mask=alive)
    code_row = (n // rows * size + k) * dims
    for start in range(0, dims, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = alive[:, None] & (d < dims)[None, :]
        used = reached[:, None] & inside
        code = tl.load(codebook + code_row[:, None] + d[None, :], mask=used, other=0.0)
        where = n[:, None] * dims + d[None, :]
        tl.store(residual + where, tl.load(residual + where, mask=used, other=0.0) - code, mask=used)
        tl.store(quantized + where, tl.load(quantized + where, mask=used, other=0.0) + code, mask=used)
        if codes is not None:
            tl.store(codes + (n * depth + stage)[:, None] * dims + d[None, :], code, mask=inside)


def residual_nearest_code(
    x: torch.Tensor,
    codebooks: torch.Tensor,
    limits: torch.Tensor | None,
    metric: str,
    quantized: torch.Tensor,
    codes: torch.Tensor,
    indices: torch.Tensor,
    upcast: bool = False,
) -> None:
    """Contiguous x [G, N, D] float32, bfloat16 or float16, codebooks [G, Q or 1, K, D] float32, limits int64 [G, N].

    Fills quantized float32 [G, N, D], codes [G, N, Q or 0, D] and indices int64 [G, N, Q]. With `upcast` the products
    are taken of float32 operands with the same values, for Triton's interpreter.
    """
    groups, rows, depth = indices.shape
    quantized.zero_()
    if not indices.numel():
        return
    _, distinct, size, dims = codebooks.shape
    books = codebooks.transpose(0, 1).contiguous()
    kept = codes if codes.numel() else None
    with torch.cuda.device_of(x):
        prepared = prepare(books.flatten(0, 1), metric)
        if fused.pays(groups * rows, prepared.tile["WIDTH"]):
            fused.all_stages(x, books, prepared, limits, quantized, kept, indices, upcast)
            return
        chosen = torch.empty(groups * rows, dtype=torch.int64, device=x.device)
        residual = x.to(torch.float32, copy=True)
        for stage in range(depth):
            book = min(stage, distinct - 1)
            search(residual, prepared.heads(book * groups, (book + 1) * groups), chosen, upcast)
            advance_kernel[(triton.cdiv(groups * rows, _ROWS),)](
                residual, quantized, kept, books[book], chosen, indices, limits,
                groups * rows, rows, size, dims, stage, depth,
                BLOCK_N=_ROWS, BLOCK_D=_columns(dims), num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def _columns(dims: int) -> int:
    return min(32, triton.next_power_of_2(dims))


def aot_configurations() -> list[dict]:
    """What is launched beside the kernels of `nearest_code`: with and without limits and code vectors, by width."""
    found = []
    for block_d in (32, 8):
        for limited, kept in ((True, True), (False, False), (True, False), (False, True)):
            pointers = {"residual": "*fp32", "quantized": "*fp32", "codes": "*fp32" if kept else None}
            pointers |= {
                "codebook": "*fp32",
                "chosen": "*i64",
                "indices": "*i64",
                "limits": "*i64" if limited else None,
            }
            sizes = dict.fromkeys(("total", "rows", "size", "dims", "stage", "depth"), "i32")
            found.append(
                {
                    "kernel": "advance_kernel",
                    "name": f"{_ROWS}x{block_d}{' limits' * limited}{' codes' * kept}",
                    "signature": pointers | sizes,
                    "constexprs": {"BLOCK_N": _ROWS, "BLOCK_D": block_d},
                    "divisible": ["residual", "quantized", "chosen", "indices"],
                    "num_warps": 4,
                }
            )
    return found
