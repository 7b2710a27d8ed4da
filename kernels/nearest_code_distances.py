"""From rows to the codes chosen for them: gathers each code and sums in float64, one pass, bound by memory."""

import torch
import triton
import triton.language as tl

BLOCK = 32


@triton.jit(do_not_specialize=["total", "of_head", "count", "codes"])
def distances_kernel(
    x,
    codebook,
    indices,
    distances,
    total,
    of_head,
    count,
    codes,
    dims,
    EUCLIDEAN: tl.constexpr,
    ROOT: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """distances [H * N * k] of x [H * N, D] to codebook [H * K, D] by indices [H * N * k]; of_head = N * k."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    alive = place < total
    row = place // count
    code = place // of_head * codes + tl.load(indices + place, mask=alive, other=0)
    total_sum = tl.zeros([BLOCK], tl.float64)
    of_row = tl.zeros([BLOCK], tl.float64)
    of_code = tl.zeros([BLOCK], tl.float64)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, dims, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = alive[:, None] & (d < dims)[None, :]
        value = tl.load(x + row[:, None] * dims + d[None, :], mask=inside, other=0.0).to(tl.float64)
        other = tl.load(codebook + code[:, None] * dims + d[None, :], mask=inside, other=0.0).to(tl.float64)
        bad += tl.sum((value != value).to(tl.int32), axis=1)
        if EUCLIDEAN:
            total_sum += tl.sum((value - other) * (value - other), axis=1)
        else:
            total_sum -= tl.sum(value * other, axis=1)
        if COSINE:
            of_row += tl.sum(value * value, axis=1)
            of_code += tl.sum(other * other, axis=1)
    if ROOT:
        total_sum = tl.sqrt(total_sum)
    if COSINE:
        norms = tl.sqrt(of_row) * tl.sqrt(of_code)
        total_sum = 1.0 + tl.where(norms == 0.0, 0.0, total_sum / tl.where(norms == 0.0, 1.0, norms))
    total_sum = tl.where((total_sum != total_sum) & (bad == 0), float("inf"), total_sum)
    tl.store(distances + place, total_sum.to(distances.dtype.element_ty), mask=alive)


def nearest_code_distances(x: torch.Tensor, codebook: torch.Tensor, indices: torch.Tensor, metric: str) -> torch.Tensor:
    """Contiguous x [H, N, D], codebook [H, K, D], indices [H, N, k] -> [H, N, k], in float64 for float64 x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    distances = torch.empty(indices.shape, dtype=dtype, device=x.device)
    total = indices.numel()
    if total:
        with torch.cuda.device_of(x):
            distances_kernel[(triton.cdiv(total, BLOCK),)](
                x, codebook, indices, distances, total, total // x.shape[0], indices.shape[2], *codebook.shape[1:],
                EUCLIDEAN=metric in ("euclidean", "sqeuclidean"), ROOT=metric == "euclidean", COSINE=metric == "cosine",
                BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return distances


def aot_configurations() -> list[dict]:
    """What is launched: each metric, the dtypes of x."""
    found = []
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        wide = "fp64" if dtype == "fp64" else "fp32"
        pointers = {"x": f"*{dtype}", "codebook": f"*{wide}", "indices": "*i64", "distances": f"*{wide}"}
        sizes = dict.fromkeys(("total", "of_head", "count", "codes", "dims"), "i32")
        for metric in ("euclidean", "sqeuclidean", "cosine", "dot"):
            choice = {"EUCLIDEAN": metric in ("euclidean", "sqeuclidean"), "ROOT": metric == "euclidean"}
            found.append(
                {
                    "kernel": "distances_kernel",
                    "name": f"{dtype} {metric}",
                    "signature": pointers | sizes,
                    "constexprs": {**choice, "COSINE": metric == "cosine", "BLOCK": BLOCK},
                    "num_warps": 4,
                }
            )
    return found
