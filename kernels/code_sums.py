"""Sums and counts of the rows given to each code: deterministic, because what is added are integers.

H heads of N rows and K codes, D dimensions. Three launches and no host synchronisation:

1. `survey_kernel` finds which rows count and, for each code, how many there are and their largest number.
2. `add_kernel` adds every number as an int64 multiple of a power of two, its code's own: as small as the code's largest
   number and its number of rows allow without overflow. Integers have one sum in any order, so atomics do.
3. `finish_kernel` turns the totals into floating point.

The unit is below 2^-58 of the code's largest number times its number of rows, so most sums are exact. Rows of a tile
that share the code of its first row are added up before they go to memory: a code that has most of the rows does not
make the others wait.
"""

import torch
import triton
import triton.language as tl

_VARIES = ["total", "rows", "codes", "dims"]
BLOCK_N = 32
# Columns of a tile at most: more masks than that do not fit the scalar registers of a gfx942.
BLOCK_D = 32


@triton.jit
def _exponent(value):
    """floor(log2(value)) of a positive, normal float64; -1023 for 0."""
    return (value.to(tl.int64, bitcast=True) >> 52) - 1023


@triton.jit
def _unit(largest, count):
    """The power of two, as an exponent, that `count` numbers up to `largest` (its float64 bits) are multiplied by."""
    exponent = 60 - _exponent(count.to(tl.float64)) - ((largest >> 52) - 1023)
    return tl.minimum(tl.maximum(exponent, -1000), 1000)


@triton.jit
def _power(exponent):
    """2^exponent in float64."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _leader(place, BLOCK_N: tl.constexpr):
    """The first row's place, which rows share it, and which have another."""
    leader = tl.sum(tl.where(tl.arange(0, BLOCK_N) == 0, place, 0), axis=0)
    together = (place >= 0) & (place == leader)
    return leader, together, (place >= 0) & (place != leader)


@triton.jit(do_not_specialize=_VARIES)
def survey_kernel(
    x,
    indices,
    weights,
    places,
    counts,
    largest,
    heaviest,
    total,
    rows,
    codes,
    dims,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """places int64 [H N]: the row's head and code, -1 where it does not count; counts and largest int64 [H K]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    alive = row < total
    index = tl.load(indices + row, mask=alive, other=-1)
    work = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    top = tl.zeros([BLOCK_N], work)
    finite = (index >= 0) & (index < codes)
    for start in range(0, dims, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = alive[:, None] & (column < dims)[None, :]
        value = tl.abs(tl.load(x + row[:, None] * dims + column[None, :], mask=inside, other=0.0).to(work))
        bounded = value < float("inf")
        finite = finite & (tl.min(bounded.to(tl.int32), axis=1) == 1)
        top = tl.maximum(top, tl.max(tl.where(bounded, value, 0.0), axis=1))
    weight = tl.full([BLOCK_N], 1.0, tl.float64)
    if WEIGHTED:
        weight = tl.abs(tl.load(weights + row, mask=alive, other=0.0).to(tl.float64))
        finite = finite & (weight < float("inf"))
    place = tl.where(finite, row // rows * codes + index, -1)
    tl.store(places + row, place, mask=alive)
    leader, together, apart = _leader(place, BLOCK_N)
    tl.atomic_add(counts + leader, tl.sum(together.to(tl.int64), axis=0), mask=leader >= 0, sem="relaxed")
    tl.atomic_add(counts + place, tl.full([BLOCK_N], 1, tl.int64), mask=apart, sem="relaxed")
    # Bits of positive numbers are ordered like the numbers.
    bits = tl.where(finite, top.to(tl.float64) * weight, 0.0).to(tl.int64, bitcast=True)
    tl.atomic_max(largest + leader, tl.max(tl.where(together, bits, 0), axis=0), mask=leader >= 0, sem="relaxed")
    tl.atomic_max(largest + place, bits, mask=apart, sem="relaxed")
    if WEIGHTED:
        bits = tl.where(finite, weight, 0.0).to(tl.int64, bitcast=True)
        tl.atomic_max(heaviest + leader, tl.max(tl.where(together, bits, 0), axis=0), mask=leader >= 0, sem="relaxed")
        tl.atomic_max(heaviest + place, bits, mask=apart, sem="relaxed")


@triton.jit(do_not_specialize=_VARIES)
def add_kernel(
    x,
    weights,
    places,
    counts,
    largest,
    heaviest,
    sums,
    weight_sums,
    total,
    dims,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums int64 [H K, D] and weight_sums int64 [H K], in multiples of each code's unit."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.load(places + row, mask=row < total, other=-1)
    used = place >= 0
    leader, together, apart = _leader(place, BLOCK_N)
    count = tl.load(counts + place, mask=used, other=1)
    scale = _power(_unit(tl.load(largest + place, mask=used, other=0), count))
    inside = used[:, None] & (column < dims)[None, :]
    value = tl.load(x + row[:, None] * dims + column[None, :], mask=inside, other=0.0).to(tl.float64)
    if WEIGHTED:
        weight = tl.load(weights + row, mask=used, other=0.0).to(tl.float64)
        value = value * weight[:, None]
    number = (value * scale[:, None]).to(tl.int64)
    common = tl.sum(tl.where(together[:, None], number, 0), axis=0)
    common_columns = tl.where(leader >= 0, dims, 0)
    tl.atomic_add(sums + leader * dims + column, common, mask=column < common_columns, sem="relaxed")
    where = place[:, None] * dims + column[None, :]
    tl.atomic_add(sums + where, number, mask=inside & apart[:, None], sem="relaxed")
    if WEIGHTED:  # noqa: SIM102 - known when it is compiled, unlike the next
        if tl.program_id(1) == 0:
            load = (weight * _power(_unit(tl.load(heaviest + place, mask=used, other=0), count))).to(tl.int64)
            common_load = tl.sum(tl.where(together, load, 0), axis=0)
            tl.atomic_add(weight_sums + leader, common_load, mask=leader >= 0, sem="relaxed")
            tl.atomic_add(weight_sums + place, load, mask=apart, sem="relaxed")


@triton.jit(do_not_specialize=_VARIES)
def finish_kernel(
    sums,
    weight_sums,
    counts,
    largest,
    heaviest,
    out_sums,
    out_counts,
    total,
    dims,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_sums [H K, D] and out_counts [H K]: totals divided by their scale."""
    code = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    alive = code < total
    inside = alive[:, None] & (column < dims)[None, :]
    count = tl.load(counts + code, mask=alive, other=0)
    at_least_one = tl.maximum(count, 1)
    scale = _power(-_unit(tl.load(largest + code, mask=alive, other=0), at_least_one))
    where = code[:, None] * dims + column[None, :]
    number = tl.load(sums + where, mask=inside, other=0)
    tl.store(out_sums + where, (number.to(tl.float64) * scale[:, None]).to(out_sums.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        heavy = count.to(tl.float64)
        if WEIGHTED:
            unit = _power(-_unit(tl.load(heaviest + code, mask=alive, other=0), at_least_one))
            heavy = tl.load(weight_sums + code, mask=alive, other=0).to(tl.float64) * unit
        tl.store(out_counts + code, heavy.to(out_counts.dtype.element_ty), mask=alive)


def code_sums(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor | None, codes: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """sums [H, K, D] and counts [H, K] of contiguous x [H, N, D], indices and weights [H, N]."""
    heads, rows, dims = x.shape

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=x.device)

    out_sums = torch.empty((heads, codes, dims), dtype=dtype, device=x.device)
    out_counts = torch.empty((heads, codes), dtype=dtype, device=x.device)
    places = torch.empty(heads * rows, dtype=torch.int64, device=x.device)
    counts, largest, sums = zeros(heads * codes), zeros(heads * codes), zeros(heads * codes, dims)
    weighted = weights is not None
    heaviest, weight_sums = (zeros(heads * codes), zeros(heads * codes)) if weighted else (None, None)
    block_d = block(dims)
    tiles, wide = triton.cdiv(heads * rows, BLOCK_N), max(1, triton.cdiv(dims, block_d))
    options = {"WEIGHTED": weighted, "BLOCK_N": BLOCK_N, "BLOCK_D": block_d, "num_warps": 4, "enable_fp_fusion": True}
    with torch.cuda.device_of(x):
        if tiles:
            survey_kernel[(tiles,)](
                x, indices, weights, places, counts, largest, heaviest, heads * rows, rows, codes, dims, **options
            )
            add_kernel[(tiles, wide)](
                x, weights, places, counts, largest, heaviest, sums, weight_sums, heads * rows, dims, **options
            )
        if heads:
            totals = (sums, weight_sums, counts, largest, heaviest)
            finish_kernel[(triton.cdiv(heads * codes, BLOCK_N), wide)](
                *totals, out_sums, out_counts, heads * codes, dims, **options
            )
    return out_sums, out_counts


def block(dims: int) -> int:
    """Columns of a tile, a power of two."""
    return min(BLOCK_D, max(16, triton.next_power_of_2(max(dims, 1))))


def aot_configurations() -> list[dict]:
    """What is launched: the three kernels, with and without weights, the dtypes of x."""
    found = []
    for dtype, result, dims, weighted in (
        ("fp32", "fp32", 64, False),
        ("bf16", "fp32", 64, True),
        ("fp16", "fp32", 8, False),
        ("fp64", "fp64", 64, True),
    ):
        weights = "*fp32" if weighted else None
        extra = "*i64" if weighted else None
        codes = {"counts": "*i64", "largest": "*i64", "heaviest": extra}
        data = {"x": f"*{dtype}", "weights": weights, "places": "*i64"}
        for kernel, signature in (
            ("add_kernel", data | codes | {"sums": "*i64", "weight_sums": extra}),
            ("survey_kernel", data | codes | {"indices": "*i64", "rows": "i32", "codes": "i32"}),
            (
                "finish_kernel",
                codes | {"sums": "*i64", "weight_sums": extra, "out_sums": f"*{result}", "out_counts": f"*{result}"},
            ),
        ):
            found.append(
                {
                    "kernel": kernel,
                    "name": f"{dtype} {BLOCK_N}x{block(dims)}{' weighted' if weighted else ''}",
                    "signature": signature | {"total": "i32", "dims": "i32"},
                    "constexprs": {"WEIGHTED": weighted, "BLOCK_N": BLOCK_N, "BLOCK_D": block(dims)},
                    "num_warps": 4,
                }
            )
    return found
