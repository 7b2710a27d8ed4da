"""A code of every row by the Gumbel-max rule: argmax of -distance / temperature + bias + noise, in one pass over codes.

H heads of N rows and K codes, D dimensions, float32. The noise of a score is a word of the Philox counter (code // 4,
head, row id low, row id high): a function of its place alone, so tiles can be of any size.
"""

import torch
import triton
import triton.language as tl

from .code_scores import distances
from .philox import gumbel

BLOCK_N = 32
BLOCK_K = 64


@triton.jit
def _noise(key, start, head, row_ids, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Standard Gumbel numbers [BLOCK_N, BLOCK_K] of codes from `start` on."""
    groups = (start // 4 + tl.arange(0, BLOCK_K // 4)).to(tl.uint32)
    low, high = (row_ids & 0xFFFFFFFF).to(tl.uint32), ((row_ids >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, groups[None, :], head.to(tl.uint32), low[:, None], high[:, None])
    pairs = tl.join(tl.join(gumbel(w0), gumbel(w2)), tl.join(gumbel(w1), gumbel(w3)))
    return tl.reshape(pairs, [BLOCK_N, BLOCK_K])


@triton.jit(do_not_specialize=["rows", "count"])
def sample_kernel(
    x,
    codes,
    bias,
    temperature,
    seed,
    row_ids,
    out,
    rows,
    count,
    dims,
    DOT: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out int64 [H, N] of x [H, D, N], codes [H, D, K], bias [H, K], row_ids int64 [N]."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += head * dims * rows
    codes += head * dims * count
    inverse = 1.0 / tl.load(temperature)
    key = tl.load(seed)
    ids = tl.load(row_ids + n, mask=n < rows, other=0)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    winner = tl.zeros([BLOCK_N], tl.int64)
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        far = distances(x, codes, n, k, rows, count, dims, DOT, ROOT, BLOCK_N, BLOCK_K)
        offset = tl.load(bias + head * count + k, mask=k < count, other=float("-inf"))
        total = offset[None, :] - far * inverse + _noise(key, start, head, ids, BLOCK_N, BLOCK_K)
        largest = tl.max(total, axis=1)
        place = tl.min(tl.where(total == largest[:, None], k[None, :], count), axis=1)
        # Strictly larger: ties go to the lower index.
        winner = tl.where(largest > best, place, winner)
        best = tl.maximum(best, largest)
    tl.store(out + head * rows + n, winner, mask=n < rows)


def sample_code(
    x: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor,
    metric: str,
) -> torch.Tensor:
    """int64 [H, N] of contiguous x [H, N, D], codes [H, K, D], bias [H, K], temperature [], seed [1], row_ids [N]."""
    heads, rows, dims = x.shape
    out = torch.empty((heads, rows), dtype=torch.int64, device=x.device)
    if out.numel():
        turned = x.transpose(1, 2).contiguous(), codes.transpose(1, 2).contiguous()
        with torch.cuda.device_of(x):
            sample_kernel[(triton.cdiv(rows, BLOCK_N), heads)](
                *turned, bias, temperature, seed, row_ids, out, rows, codes.shape[1], dims, DOT=metric == "dot",
                ROOT=metric == "euclidean", BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def aot_configurations() -> list[dict]:
    """What is launched: one tile, each metric."""
    pointers = dict.fromkeys(("x", "codes", "bias", "temperature"), "*fp32")
    pointers |= dict.fromkeys(("seed", "row_ids", "out"), "*i64")
    return [
        {
            "kernel": "sample_kernel",
            "name": metric,
            "signature": pointers | dict.fromkeys(("rows", "count", "dims"), "i32"),
            "constexprs": {
                "DOT": metric == "dot",
                "ROOT": metric == "euclidean",
                "BLOCK_N": BLOCK_N,
                "BLOCK_K": BLOCK_K,
            },
            "num_warps": 4,
        }
        for metric in ("euclidean", "sqeuclidean", "dot")
    ]
