"""The nearest code of every row, exactly: a certified search on tensor cores, float64 for the rows it cannot decide.

H heads of N rows and K codes, D dimensions. Three launches (four where rows are few) and no host synchronisation:

1. `prepare_kernel` centres the codes and splits each into two bfloat16 parts, padded so that the search has no masks.
2. `search_kernel` scores s = |e|^2/2 - x.e (Euclidean) or -x.e from three bfloat16 products, keeps the smallest two
   scores of a row, and certifies the winner if they are further apart than twice the error bound. Other rows go on a
   list, in any order. Where the rows alone would leave multiprocessors idle, the codes are shared out too, and
   `merge_kernel` takes the parts' smallest scores together in order.
3. `rescore_kernel` decides the listed rows by the definition: float64, d increasing, nothing fused, lowest index.

The bound holds for x = hi + lo + rest with |rest| <= 2^-17 |x|, the dropped lo.lo <= 2^-16 |x||e|, and sums of 3D
products that tensor cores may align and truncate at every step of 16. What tensor cores do to a sum is not documented:
its share of the bound is twice what would follow from one truncation a step, until the largest error of a score over
|x||e| has been measured on each architecture for D from 8 to 768; that measurement may halve it. Whatever could
overflow, is not a number or is closer than the bound is rescored.

The precisions "bf16" and "tf32" take one product of rounded operands and certify nothing.
"""

import torch
import triton
import triton.language as tl

from .nearest_code_prepared import Prepared, _split, _tf32, prepare, tiles
from .offsets import element

_VARIES = ["rows", "codes"]
# Programs that share the list of undecided rows, whose length only the device knows.
RESCORERS = 1024
# Programs that keep every multiprocessor of the largest GPUs busy twice.
ENOUGH = 264


@triton.jit
def _rows(x, centre, offsets, d, dims, alive, EUCLIDEAN: tl.constexpr):
    """A tile of rows as float32 [BLOCK_N, BLOCK_D], centred."""
    inside = alive[:, None] & (d < dims)[None, :]
    value = tl.load(x + offsets[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if EUCLIDEAN:
        value -= tl.load(centre + d, mask=d < dims, other=0.0)[None, :]
    return value


@triton.jit
def _parts(value, PRECISION: tl.constexpr):
    """The two parts of rows; what is not finite is rescored and would here only upset the comparisons."""
    value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
    if PRECISION == "tf32":
        return _tf32(value), value
    return _split(value)


@triton.jit
def _products(sums, xh, xl, high, low, where, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """sums + x.e from the products of the parts; float32 operands of the same values where interpreted."""
    eh = tl.load(high + where)
    if PRECISION == "tf32":
        sums = tl.dot(xh, eh, sums, input_precision="tf32")
    else:
        if UPCAST:
            eh = eh.to(tl.float32)
        else:
            xh = xh.to(tl.bfloat16)
        if PRECISION == "exact":
            el = tl.load(low + where)
            if UPCAST:
                el = el.to(tl.float32)
            else:
                xl = xl.to(tl.bfloat16)
            sums = tl.dot(xl, eh, sums, input_precision="ieee")
            sums = tl.dot(xh, el, sums, input_precision="ieee")
        sums = tl.dot(xh, eh, sums, input_precision="ieee")
    return sums


@triton.jit
def _best_two(scores, k, tile, v1, i1, v2):
    """After one more tile of scores: the smallest of every row, its code, and the second smallest."""
    # Which of two equal scores wins does not matter to the exact search: they are never certified.
    w1, j1 = tl.min(scores, axis=1, return_indices=True)
    w2 = tl.min(tl.where(k[None, :] == (tile + j1)[:, None], float("inf"), scores), axis=1)
    v2 = tl.minimum(tl.minimum(v2, w2), tl.maximum(v1, w1))
    i1 = tl.where(w1 < v1, tile + j1, i1)
    return tl.minimum(v1, w1), i1, v2


@triton.jit
def _certified(v1, v2, square, dims, limits, EUCLIDEAN: tl.constexpr):
    """Whether the two best scores of a row of squared norm `square` are further apart than their errors allow."""
    largest = tl.load(limits)
    width = 1.0 * dims  # D = 1 is a constant to the compiler, and has no methods
    norm = tl.sqrt(square) * 1.001 + width * 1e-18
    product = norm * largest
    search = 3.0517578125e-05 + (3.25 * width + 32.0) * 1.1920929e-07
    evaluation = (width + 6.0) * 8.8817842e-16
    if EUCLIDEAN:
        magnitude = product + largest * largest
        error = search * product + 2.3841858e-07 * largest * largest
        error += evaluation * (norm + largest) * (norm + largest)
    else:
        magnitude = product
        error = search * product + evaluation * norm * tl.load(limits + 1)
    error += (3.0 * width + 8.0) * 1.1754944e-38 * (1.0 + norm + largest)
    # False, too, for what is not a number.
    return (v2 - v1 > 2.0 * error) & (magnitude < 1e37)


@triton.jit
def _decide(
    v1, i1, v2, square, row, alive, limits, head, dims, indices, undecided, count,
    EUCLIDEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the winners of certified rows, and lists the others."""
    if PRECISION != "exact":
        # A row with a NaN gets the first code.
        tl.store(indices + row, tl.where(square == square, i1, 0).to(tl.int64), mask=alive)
    else:
        certified = _certified(v1, v2, square, dims, limits + 2 * head, EUCLIDEAN)
        tl.store(indices + row, i1.to(tl.int64), mask=alive & certified)
        listed = alive & (certified == 0)
        place = tl.atomic_add(count + tl.zeros_like(i1), 1, mask=listed, sem="relaxed")
        tl.store(undecided + place, row, mask=listed)


@triton.jit(do_not_specialize=_VARIES)
def search_kernel(
    x,
    centre,
    high,
    low,
    bias,
    limits,
    indices,
    undecided,
    count,
    values,
    places,
    rows,
    codes,
    dims,
    padded,
    span,
    EUCLIDEAN: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """indices int64 [H, N] of certified rows; the others' numbers in undecided [H * N], how many in count [1].

    Up to BLOCK_D dimensions the rows stay on chip, split once; wider rows are read again for every tile of codes. With
    PARTS a program sees `span` codes, and leaves values [parts, 3, H * N] (smallest, second, squared norm of the row)
    and places [parts, H * N] to `merge_kernel`.
    """
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    alive = n < rows
    row = element(head, n, rows, 1)
    offsets = element(head, n, rows, dims)
    centre += head * dims
    high += element(head, 0, padded, WIDTH)
    low += element(head, 0, padded, WIDTH)
    bias += head * padded
    square = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        value = _rows(x, centre, offsets, start + tl.arange(0, BLOCK_D), dims, alive, EUCLIDEAN)
        square += tl.sum(value * value, axis=1)
    xh, xl = _parts(_rows(x, centre, offsets, tl.arange(0, BLOCK_D), dims, alive, EUCLIDEAN), PRECISION)
    v1 = tl.full([BLOCK_N], float("inf"), tl.float32)
    v2 = v1
    i1 = tl.zeros([BLOCK_N], tl.int32)
    for tile in range(part * span, tl.minimum((part + 1) * span, padded), BLOCK_K):
        k = tile + tl.arange(0, BLOCK_K)
        sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if WIDTH == BLOCK_D:
            where = element(0, k, 0, WIDTH)[None, :] + tl.arange(0, BLOCK_D)[:, None]
            sums = _products(sums, xh, xl, high, low, where, PRECISION, UPCAST)
        else:
            for start in range(0, WIDTH, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                xh, xl = _parts(_rows(x, centre, offsets, d, dims, alive, EUCLIDEAN), PRECISION)
                where = element(0, k, 0, WIDTH)[None, :] + d[:, None]
                sums = _products(sums, xh, xl, high, low, where, PRECISION, UPCAST)
        v1, i1, v2 = _best_two(tl.load(bias + k)[None, :] - sums, k, tile, v1, i1, v2)
    if PARTS:
        total = element(tl.num_programs(1), 0, rows, 1)
        values += part * 3 * total + row
        tl.store(values, v1, mask=alive)
        tl.store(values + total, v2, mask=alive)
        tl.store(values + 2 * total, square, mask=alive)
        tl.store(places + part * total + row, i1, mask=alive)
    else:
        _decide(v1, i1, v2, square, row, alive, limits, head, dims, indices, undecided, count, EUCLIDEAN, PRECISION)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_kernel(
    limits, indices, undecided, count, values, places, rows, parts, dims,
    EUCLIDEAN: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `search_kernel` decides, from the parts in order: of equal scores the first stays."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = n < rows
    row = element(head, n, rows, 1)
    total = element(tl.num_programs(1), 0, rows, 1)
    values += row
    places += row
    square = tl.load(values + 2 * total, mask=alive, other=0.0)
    v1 = tl.full([BLOCK], float("inf"), tl.float32)
    v2 = v1
    i1 = tl.zeros([BLOCK], tl.int32)
    for _ in range(parts):
        w1 = tl.load(values, mask=alive, other=0.0)
        w2 = tl.load(values + total, mask=alive, other=0.0)
        j1 = tl.load(places, mask=alive, other=0)
        v2 = tl.minimum(tl.minimum(v2, w2), tl.maximum(v1, w1))
        i1 = tl.where(w1 < v1, j1, i1)
        v1 = tl.minimum(v1, w1)
        values += 3 * total
        places += total
    _decide(v1, i1, v2, square, row, alive, limits, head, dims, indices, undecided, count, EUCLIDEAN, PRECISION)


@triton.jit
def _nearest_exactly(
    row, flipped, codes, dims, padded, EUCLIDEAN: tl.constexpr, COSINE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The nearest code of one row [D] in flipped [D, padded] by the definition, int64."""
    best = tl.full([], float("inf"), tl.float64)
    winner = tl.full([], 0, tl.int64)
    for tile in range(0, codes, BLOCK_K):
        k = tile + tl.arange(0, BLOCK_K)
        inside = k < codes
        scores = tl.zeros([BLOCK_K], tl.float64)
        squares = tl.zeros([BLOCK_K], tl.float64)
        column = flipped + k
        for d in range(dims):
            value = tl.load(row + d).to(tl.float64)
            code = tl.load(column, mask=inside, other=0.0).to(tl.float64)
            column += padded
            if EUCLIDEAN:
                scores += (value - code) * (value - code)
            else:
                scores -= value * code
            if COSINE:
                squares += code * code
        if COSINE:
            scores = scores / tl.where(squares == 0.0, 1.0, tl.sqrt(squares))
        scores = tl.where(inside & (scores == scores), scores, float("inf"))
        smallest = tl.min(scores, axis=0)
        lowest = tl.min(tl.where(scores == smallest, k, codes), axis=0).to(tl.int64)
        better = smallest < best
        winner = tl.where(better, lowest, winner)
        best = tl.where(better, smallest, best)
    return winner


@triton.jit(do_not_specialize=_VARIES)
def rescore_kernel(
    x,
    flipped,
    indices,
    undecided,
    count,
    rows,
    codes,
    dims,
    padded,
    EUCLIDEAN: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """indices of the listed rows by the definition: each of BLOCK_K codes is one chain of float64 sums."""
    listed = tl.load(count)
    for place in range(tl.program_id(0), listed, tl.num_programs(0)):
        row = tl.load(undecided + place)
        winner = _nearest_exactly(
            x + element(0, row, 0, dims), flipped + element(row // rows, 0, dims, padded), codes, dims, padded,
            EUCLIDEAN, COSINE, BLOCK_K,
        )  # fmt: skip
        tl.store(indices + row, winner)


def nearest_code(
    x: torch.Tensor, codebook: torch.Tensor, metric: str, precision: str = "exact", upcast: bool = False
) -> torch.Tensor:
    """indices int64 [H, N, 1] of contiguous x [H, N, D] float32, bfloat16 or float16 in codebook [H, K, D] float32.

    With `upcast` the products are taken of float32 operands with the same values, for Triton's interpreter.
    """
    indices = torch.empty((*x.shape[:2], 1), dtype=torch.int64, device=x.device)
    if indices.numel():
        with torch.cuda.device_of(x):
            search(x, prepare(codebook, metric, precision), indices, upcast)
    return indices


def search(x: torch.Tensor, prepared: Prepared, indices: torch.Tensor, upcast: bool = False) -> None:
    """Fills contiguous indices int64, H * N of them, for x [H, N, D], at least one row."""
    heads, rows, dims = x.shape
    codes, padded, tile, precision = prepared.codes, prepared.padded, prepared.tile, prepared.precision
    block_n, block_k, block_d, width = tile["BLOCK_N"], tile["BLOCK_K"], tile["BLOCK_D"], tile["WIDTH"]
    exact, euclidean, bias, limits = precision == "exact", prepared.euclidean, prepared.bias, prepared.limits

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    undecided = empty(heads * rows, dtype=torch.int64) if exact else indices
    count = torch.zeros(1, dtype=torch.int64, device=x.device)
    span, parts = shares(triton.cdiv(rows, block_n) * heads, padded, block_k)
    values = empty(parts, 3, heads * rows) if parts > 1 else bias
    places = empty(parts, heads * rows, dtype=torch.int32) if parts > 1 else bias
    warps, stages = tile["num_warps"], tile["num_stages"]
    search_kernel[(triton.cdiv(rows, block_n), heads, parts)](
        x, prepared.centre, prepared.high, prepared.low, bias, limits, indices, undecided, count, values, places,
        rows, codes, dims, padded, span,
        EUCLIDEAN=euclidean, PRECISION=precision, PARTS=parts > 1, WIDTH=width, BLOCK_N=block_n,
        BLOCK_K=block_k, BLOCK_D=block_d, UPCAST=upcast, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    if parts > 1:
        merge_kernel[(triton.cdiv(rows, 128), heads)](
            limits, indices, undecided, count, values, places, rows, parts, dims,
            EUCLIDEAN=euclidean, PRECISION=precision, BLOCK=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if exact:
        rescore_kernel[(min(heads * rows, RESCORERS),)](
            x, prepared.flipped, indices, undecided, count, rows, codes, dims, padded,
            EUCLIDEAN=euclidean, COSINE=prepared.metric == "cosine", BLOCK_K=128, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def shares(programs: int, padded: int, block_k: int) -> tuple[int, int]:
    """How many codes a program of the search sees, and how many such parts there are: one where rows are many."""
    blocks = padded // block_k
    span = triton.cdiv(blocks, min(blocks, max(1, ENOUGH // programs)))
    return span * block_k, triton.cdiv(blocks, span)


def aot_configurations() -> list[dict]:
    """What is launched: every entry of the table on its target, the kernels, the dtypes of x, the precisions."""
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    found = [_search("fp32", dims, target) for dims in (64, 8, 32, 128, 256) for target in targets]
    found += [_search(dtype, 64, target) for dtype in ("bf16", "fp16") for target in targets]
    found += [_search("fp32", 64, target, precision) for precision in ("bf16", "tf32") for target in targets]
    found += [_search("fp32", 64, target, parts=True) for target in targets]
    sizes = dict.fromkeys(("codes", "dims", "padded"), "i32")
    for euclidean, cosine in ((True, False), (False, True), (False, False)):
        choice = {"EUCLIDEAN": euclidean, "COSINE": cosine}
        pointers = {"x": "*fp32", "flipped": "*fp32", "indices": "*i64", "undecided": "*i64", "count": "*i64"}
        signature = pointers | {"rows": "i32"} | sizes
        found.append(_configuration("rescore_kernel", signature, choice | {"BLOCK_K": 128}, 4, 3))
    pointers = {"limits": "*fp32", "indices": "*i64", "undecided": "*i64", "count": "*i64"}
    pointers |= {"values": "*fp32", "places": "*i32"}
    constexprs = {"EUCLIDEAN": True, "PRECISION": "exact", "BLOCK": 128}
    merged = pointers | dict.fromkeys(("rows", "parts", "dims"), "i32")
    found.append(_configuration("merge_kernel", merged, constexprs, 4, 3))
    return found


def _search(dtype: str, dims: int, target: str, precision: str = "exact", parts: bool = False) -> dict:
    tile = tiles(dims, target)
    codes = "*fp32" if precision == "tf32" else "*bf16"
    pointers = {"x": f"*{dtype}", "centre": "*fp32", "high": codes, "low": codes, "bias": "*fp32"}
    pointers |= {"limits": "*fp32", "indices": "*i64", "undecided": "*i64", "count": "*i64"}
    pointers |= {"values": "*fp32", "places": "*i32" if parts else "*fp32"}
    sizes = dict.fromkeys(("rows", "codes", "dims", "padded", "span"), "i32")
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    choice = {"EUCLIDEAN": True, "PRECISION": precision, "PARTS": parts, "UPCAST": False}
    return _configuration("search_kernel", pointers | sizes, {**tile, **choice}, warps, stages) | {"targets": [target]}


def _configuration(kernel: str, signature: dict, constexprs: dict, warps: int, stages: int) -> dict:
    return {
        "kernel": kernel,
        "name": " ".join(f"{name}={value}" for name, value in constexprs.items()),
        "signature": signature,
        "constexprs": constexprs,
        "divisible": [name for name, kind in signature.items() if kind.startswith("*") or name in ("padded", "span")],
        "num_warps": warps,
        "num_stages": stages,
    }
