"""Residual quantization of few, narrow rows in two launches: the residual stays on chip through all stages.

Launching three kernels a stage costs more than searching a few thousand rows. Here one program takes its rows through
all stages by the certified search; a row whose nearest code a stage cannot certify goes on a list with that stage, and
what it does from there on is void: `redo_kernel` goes on from that stage in float64. No host synchronisation.
"""

import torch
import triton
import triton.language as tl

from .nearest_code import RESCORERS, _best_two, _certified, _nearest_exactly, _parts, _products
from .nearest_code_prepared import Prepared

# Up to here launches, not the search, take the time of the kernels that go stage by stage; by estimate.
ROWS = 16384
# Padded dimensions; wider rows do not fit the registers of every target beside their sum and their parts.
_WIDTH = 16
# BLOCK_K divides what `nearest_code` pads codebooks to.
_TILE = {"BLOCK_N": 64, "BLOCK_K": 64}
_LAUNCH = {"num_warps": 8, "num_stages": 2}
_VARIES = ["rows", "size", "depth", "groups"]


@triton.jit
def _head(stage, groups, group, SHARED: tl.constexpr):
    """Which of the prepared codebooks [Q or 1, G] a stage of a group searches, int64."""
    if SHARED:
        return group
    return stage * groups + group


@triton.jit(do_not_specialize=_VARIES)
def fused_kernel(
    x,
    codebook,
    centre,
    high,
    low,
    bias,
    largest,
    limits,
    quantized,
    codes,
    indices,
    undecided,
    count,
    rows,
    size,
    dims,
    padded,
    depth,
    groups,
    SHARED: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Results of certified rows of x [G, N, D]; the others in undecided [G * N], with index -2 from where they failed.

    codebook, centre, high, low, bias and largest as `prepare_kernel` has them, for heads [Q or 1, G].
    """
    group = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    alive = n < rows
    row = group * rows + n
    d = tl.arange(0, WIDTH)
    inside = alive[:, None] & (d < dims)[None, :]
    where = row[:, None] * dims + d[None, :]
    left = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    until = tl.zeros([BLOCK_N], tl.int64) + depth
    if limits is not None:
        until = tl.load(limits + row, mask=alive, other=0)
    void = tl.zeros([BLOCK_N], tl.int32)
    for stage in range(depth):
        head = _head(stage, groups, group, SHARED)
        centred = left
        if EUCLIDEAN:
            middle = tl.load(centre + head * dims + d, mask=d < dims, other=0.0)
            centred = tl.where(inside, left - middle[None, :], 0.0)
        square = tl.sum(centred * centred, axis=1)
        xh, xl = _parts(centred, "exact")
        v1 = tl.full([BLOCK_N], float("inf"), tl.float32)
        v2 = v1
        i1 = tl.zeros([BLOCK_N], tl.int32)
        for tile in range(0, padded, BLOCK_K):
            k = tile + tl.arange(0, BLOCK_K)
            place = (head * padded + k)[None, :] * WIDTH + d[:, None]
            sums = _products(tl.zeros([BLOCK_N, BLOCK_K], tl.float32), xh, xl, high, low, place, "exact", UPCAST)
            v1, i1, v2 = _best_two(tl.load(bias + head * padded + k)[None, :] - sums, k, tile, v1, i1, v2)
        certified = _certified(v1, v2, square, dims, largest + 2 * head, EUCLIDEAN)
        reached = alive & (until > stage)
        void = tl.where(reached & (certified == 0), 1, void)
        chosen = head * size + i1
        code = tl.load(codebook + chosen[:, None] * dims + d[None, :], mask=inside & reached[:, None], other=0.0)
        left -= code
        total += code
        found = tl.where(reached, tl.where(void == 0, i1, -2), -1)
        tl.store(indices + row * depth + stage, found.to(tl.int64), mask=alive)
        if codes is not None:
            tl.store(codes + (row * depth + stage)[:, None] * dims + d[None, :], code, mask=inside)
    tl.store(quantized + where, total, mask=inside)
    listed = alive & (void != 0)
    place = tl.atomic_add(count + tl.zeros([BLOCK_N], tl.int32), 1, mask=listed, sem="relaxed")
    tl.store(undecided + place, row, mask=listed)


@triton.jit(do_not_specialize=_VARIES)
def redo_kernel(
    x,
    codebook,
    flipped,
    limits,
    residual,
    quantized,
    codes,
    indices,
    undecided,
    count,
    rows,
    size,
    dims,
    padded,
    depth,
    groups,
    SHARED: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    COSINE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The listed rows from the first stage with index -2, every code in float64; the stages before as they were found.

    residual [programs, D] is where a program keeps what is left of its row.
    """
    d = tl.arange(0, WIDTH)
    inside = d < dims
    own = residual + tl.program_id(0).to(tl.int64) * dims
    listed = tl.load(count)
    for place in range(tl.program_id(0), listed, tl.num_programs(0)):
        row = tl.load(undecided + place)
        left = tl.load(x + row * dims + d, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([WIDTH], tl.float32)
        until = tl.zeros([], tl.int64) + depth
        if limits is not None:
            until = tl.minimum(until, tl.load(limits + row))
        for stage in range(until.to(tl.int32)):
            head = _head(stage, groups, row // rows, SHARED)
            k = tl.load(indices + row * depth + stage)
            if k == -2:
                # All threads read what each has written.
                tl.store(own + d, left, mask=inside)
                tl.debug_barrier()
                k = _nearest_exactly(
                    own, flipped + head * dims * padded, size, dims, padded, EUCLIDEAN, COSINE, BLOCK_K
                )
                tl.debug_barrier()
                tl.store(indices + row * depth + stage, k)
            code = tl.load(codebook + (head * size + k) * dims + d, mask=inside, other=0.0)
            left -= code
            total += code
            if codes is not None:
                tl.store(codes + (row * depth + stage) * dims + d, code, mask=inside)
        tl.store(quantized + row * dims + d, total, mask=inside)


def all_stages(
    x: torch.Tensor,
    books: torch.Tensor,
    prepared: Prepared,
    limits: torch.Tensor | None,
    quantized: torch.Tensor,
    codes: torch.Tensor | None,
    indices: torch.Tensor,
    upcast: bool,
) -> None:
    """x [G, N, D], books [Q or 1, G, K, D] and the same prepared."""
    groups, rows, depth = indices.shape
    distinct, _, size, dims = books.shape
    programs = min(groups * rows, RESCORERS)
    undecided = torch.empty(groups * rows, dtype=torch.int64, device=x.device)
    count = torch.zeros(1, dtype=torch.int64, device=x.device)
    residual = torch.empty((programs, dims), dtype=torch.float32, device=x.device)
    sizes = (rows, size, dims, prepared.padded, depth, groups)
    shared, width, euclidean = distinct == 1, prepared.tile["WIDTH"], prepared.euclidean
    fused_kernel[(triton.cdiv(rows, _TILE["BLOCK_N"]), groups)](
        x, books, prepared.centre, prepared.high, prepared.low, prepared.bias, prepared.limits, limits,
        quantized, codes, indices, undecided, count, *sizes,
        SHARED=shared, EUCLIDEAN=euclidean, WIDTH=width, UPCAST=upcast, **_TILE, **_LAUNCH, enable_fp_fusion=True,
    )  # fmt: skip
    redo_kernel[(programs,)](
        x, books, prepared.flipped, limits, residual, quantized, codes, indices, undecided, count, *sizes,
        SHARED=shared, EUCLIDEAN=euclidean, COSINE=prepared.metric == "cosine", WIDTH=width, BLOCK_K=128,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def pays(rows: int, width: int) -> bool:
    """Whether to take all rows, of so many padded dimensions, through the stages at once."""
    return rows <= ROWS and width == _WIDTH


def aot_configurations() -> list[dict]:
    """What is launched: the dtypes of x, with and without limits and code vectors."""
    found = [_configuration("fused_kernel", "fp32", True), _configuration("redo_kernel", "fp32", True)]
    found += [_configuration("fused_kernel", dtype, False) for dtype in ("fp32", "bf16", "fp16")]
    # D = 1 is a constant to the compiler.
    single = _configuration("fused_kernel", "fp32", False)
    del single["signature"]["dims"]
    single |= {"name": "fp32 D=1", "constexprs": single["constexprs"] | {"dims": 1}}
    return [*found, _configuration("redo_kernel", "bf16", False), single]


def _configuration(kernel: str, dtype: str, options: bool) -> dict:
    fused = kernel == "fused_kernel"
    pointers = {"x": f"*{dtype}", "codebook": "*fp32"}
    if fused:
        pointers |= {"centre": "*fp32", "high": "*bf16", "low": "*bf16", "bias": "*fp32", "largest": "*fp32"}
    else:
        pointers |= {"flipped": "*fp32", "residual": "*fp32"}
    pointers |= {"limits": "*i64" if options else None, "quantized": "*fp32", "codes": "*fp32" if options else None}
    pointers |= {"indices": "*i64", "undecided": "*i64", "count": "*i64"}
    sizes = dict.fromkeys(("rows", "size", "dims", "padded", "depth", "groups"), "i32")
    constexprs = {"SHARED": False, "EUCLIDEAN": True, "WIDTH": _WIDTH}
    constexprs |= {**_TILE, "UPCAST": False} if fused else {"COSINE": False, "BLOCK_K": 128}
    return {
        "kernel": kernel,
        "name": f"{dtype}{' limits and codes' * options}",
        "signature": pointers | sizes,
        "constexprs": constexprs,
        "divisible": [name for name, kind in pointers.items() if kind is not None] + ["padded"],
        **(_LAUNCH if fused else {"num_warps": 4}),
    }
