"""The nearest code of every row, exactly: a certified search on tensor cores, float64 for the rows it cannot decide.

H heads of N rows and K codes, D dimensions. Three launches and no host synchronisation:

1. `prepare_kernel` centres the codes and splits each into two bfloat16 parts, padded so that the search has no masks.
2. `search_kernel` scores s = |e|^2/2 - x.e (Euclidean) or -x.e from three bfloat16 products, keeps the smallest two
   scores of a row, and certifies the winner if they are further apart than twice the error bound. Other rows go on a
   list, in any order.
3. `rescore_kernel` decides the listed rows by the definition: float64, d increasing, nothing fused, lowest index.

The bound holds for x = hi + lo + rest with |rest| <= 2^-17 |x|, the dropped lo.lo <= 2^-16 |x||e|, and sums of 3D
products that tensor cores may align and truncate at every step of 16. Whatever could overflow, is not a number or is
closer than that is rescored.
"""

import torch
import triton
import triton.language as tl

_VARIES = ["rows", "codes"]
# Programs that share the list of undecided rows, whose length only the device knows.
RESCORERS = 1024


@triton.jit
def _bfloat16(value):
    """float32 rounded to the nearest bfloat16, to even; by bits, because interpreted conversions truncate."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _split(value):
    """float32 as a high and a low bfloat16, each still float32."""
    high = _bfloat16(value)
    return high, _bfloat16(value - high)


@triton.jit(do_not_specialize=["codes"])
def prepare_kernel(
    codebook,
    centre,
    high,
    low,
    bias,
    flipped,
    limits,
    codes,
    dims,
    padded,
    EUCLIDEAN: tl.constexpr,
    COSINE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """codebook [H, K, D] -> high, low [H, padded, WIDTH], bias [H, padded], flipped [H, D, padded], limits [H, 2]."""
    head = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = codebook + (head * codes + k)[:, None] * dims
    finite = k < codes
    square = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (k < codes)[:, None] & (d < dims)[None, :]
        value = tl.load(rows + d[None, :], mask=inside, other=0.0)
        finite = finite & (tl.max((tl.abs(value) < float("inf")).to(tl.int32) ^ 1, axis=1) == 0)
        square += tl.sum(value.to(tl.float64) * value.to(tl.float64), axis=1)
        tl.store(flipped + (head * dims + d[None, :]) * padded + k[:, None], value, mask=inside)
    divisor = tl.full([BLOCK_K], 1.0, tl.float64)
    if COSINE:
        divisor = tl.where(square == 0.0, 1.0, tl.sqrt(square))
    centred_square = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = finite[:, None] & (d < dims)[None, :]
        value = tl.load(rows + d[None, :], mask=inside, other=0.0).to(tl.float64) / divisor[:, None]
        value -= tl.load(centre + head * dims + d, mask=d < dims, other=0.0)[None, :].to(tl.float64)
        value = tl.where(inside, value, 0.0)
        centred_square += tl.sum(value * value, axis=1)
        hi, lo = _split(value.to(tl.float32))
        where = (head * padded + k)[:, None] * WIDTH + d[None, :]
        tl.store(high + where, hi.to(tl.bfloat16))
        tl.store(low + where, lo.to(tl.bfloat16))
    half = tl.zeros([BLOCK_K], tl.float32)
    if EUCLIDEAN:
        half = (centred_square * 0.5).to(tl.float32)
    tl.store(bias + head * padded + k, tl.where(finite, half, float("inf")))
    largest = tl.where(finite, tl.sqrt(centred_square), 0.0)
    uncentred = tl.where(finite, tl.sqrt(square) / divisor, 0.0)
    if not (EUCLIDEAN or COSINE):
        # An infinite code can be the nearest by -x.e: then nothing is certified.
        largest = tl.where(finite | (k >= codes), largest, float("inf"))
    tl.atomic_max(limits + 2 * head, tl.max(largest, axis=0).to(tl.float32) * 1.00001)
    tl.atomic_max(limits + 2 * head + 1, tl.max(uncentred, axis=0).to(tl.float32) * 1.00001)


@triton.jit
def _rows(x, centre, offsets, d, dims, alive, EUCLIDEAN: tl.constexpr):
    """A tile of rows as float32 [BLOCK_N, BLOCK_D], centred."""
    inside = alive[:, None] & (d < dims)[None, :]
    value = tl.load(x + offsets[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if EUCLIDEAN:
        value -= tl.load(centre + d, mask=d < dims, other=0.0)[None, :]
    return value


@triton.jit
def _parts(value):
    """The two parts of rows; what is not finite is rescored and would here only upset the comparisons."""
    return _split(tl.where(tl.abs(value) < float("inf"), value, 0.0))


@triton.jit
def _products(sums, xh, xl, high, low, where, UPCAST: tl.constexpr):
    """sums + x.e from three products of the two parts; float32 operands of the same values where interpreted."""
    eh = tl.load(high + where)
    el = tl.load(low + where)
    if UPCAST:
        eh, el = eh.to(tl.float32), el.to(tl.float32)
    else:
        xh, xl = xh.to(tl.bfloat16), xl.to(tl.bfloat16)
    sums = tl.dot(xl, eh, sums, input_precision="ieee")
    sums = tl.dot(xh, el, sums, input_precision="ieee")
    return tl.dot(xh, eh, sums, input_precision="ieee")


@triton.jit
def _best_two(scores, k, tile, v1, i1, v2):
    """After one more tile of scores: the smallest of every row, its code, and the second smallest."""
    # Which of two equal scores wins does not matter: they are never certified.
    w1, j1 = tl.min(scores, axis=1, return_indices=True)
    w2 = tl.min(tl.where(k[None, :] == (tile + j1)[:, None], float("inf"), scores), axis=1)
    v2 = tl.minimum(tl.minimum(v2, w2), tl.maximum(v1, w1))
    i1 = tl.where(w1 < v1, tile + j1, i1)
    return tl.minimum(v1, w1), i1, v2


@triton.jit
def _certified(v1, v2, square, dims, limits, EUCLIDEAN: tl.constexpr):
    """Whether the two best scores of a row of squared norm `square` are further apart than their errors allow."""
    largest = tl.load(limits)
    width = 1.0 * dims  # dims = 1 is a constant to the compiler, and has no methods
    norm = tl.sqrt(square) * 1.001 + width * 1e-18
    product = norm * largest
    search = 3.0517578125e-05 + (3.25 * width + 32.0) * 1.1920929e-07
    evaluation = (width + 6.0) * 8.8817842e-16
    if EUCLIDEAN:
        magnitude = product + largest * largest
        error = search * product + 2.3841858e-07 * largest * largest + evaluation * (norm + largest) * (norm + largest)
    else:
        magnitude = product
        error = search * product + evaluation * norm * tl.load(limits + 1)
    error += (3.0 * width + 8.0) * 1.1754944e-38 * (1.0 + norm + largest)
    # False, too, for what is not a number.
    return (v2 - v1 > 2.0 * error) & (magnitude < 1e37)


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
    rows,
    codes,
    dims,
    padded,
    EUCLIDEAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """indices int64 [H, N] of certified rows; the others' numbers in undecided [H * N], how many in count [1].

    Up to BLOCK_D dimensions the rows stay on chip, split once; wider rows are read again for every tile of codes.
    """
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    alive = n < rows
    row = head * rows + n
    offsets = row * dims
    centre += head * dims
    high += head * padded * WIDTH
    low += head * padded * WIDTH
    bias += head * padded
    square = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        value = _rows(x, centre, offsets, start + tl.arange(0, BLOCK_D), dims, alive, EUCLIDEAN)
        square += tl.sum(value * value, axis=1)
    xh, xl = _parts(_rows(x, centre, offsets, tl.arange(0, BLOCK_D), dims, alive, EUCLIDEAN))
    v1 = tl.full([BLOCK_N], float("inf"), tl.float32)
    v2 = v1
    i1 = tl.zeros([BLOCK_N], tl.int32)
    for tile in range(0, padded, BLOCK_K):
        k = tile + tl.arange(0, BLOCK_K)
        sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if WIDTH == BLOCK_D:
            where = k.to(tl.int64)[None, :] * WIDTH + tl.arange(0, BLOCK_D)[:, None]
            sums = _products(sums, xh, xl, high, low, where, UPCAST)
        else:
            for start in range(0, WIDTH, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                xh, xl = _parts(_rows(x, centre, offsets, d, dims, alive, EUCLIDEAN))
                sums = _products(sums, xh, xl, high, low, k.to(tl.int64)[None, :] * WIDTH + d[:, None], UPCAST)
        v1, i1, v2 = _best_two(tl.load(bias + k)[None, :] - sums, k, tile, v1, i1, v2)
    certified = _certified(v1, v2, square, dims, limits + 2 * head, EUCLIDEAN)
    tl.store(indices + row, i1.to(tl.int64), mask=alive & certified)
    place = tl.atomic_add(count + tl.zeros([BLOCK_N], tl.int32), 1, mask=alive & (certified == 0), sem="relaxed")
    tl.store(undecided + place, row, mask=alive & (certified == 0))


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
        head = row // rows
        winner = _nearest_exactly(
            x + row * dims, flipped + head * dims * padded, codes, dims, padded, EUCLIDEAN, COSINE, BLOCK_K
        )
        tl.store(indices + row, winner)


def nearest_code(x: torch.Tensor, codebook: torch.Tensor, metric: str, upcast: bool = False) -> torch.Tensor:
    """indices int64 [H, N, 1] of contiguous x [H, N, D] float32, bfloat16 or float16 in codebook [H, K, D] float32.

    With `upcast` the products are taken of float32 operands with the same values, for Triton's interpreter.
    """
    heads, rows, dims = x.shape
    codes = codebook.shape[1]
    indices = torch.empty((heads, rows, 1), dtype=torch.int64, device=x.device)
    if not indices.numel():
        return indices
    euclidean, cosine = metric in ("euclidean", "sqeuclidean"), metric == "cosine"
    tile = tiles(dims)
    block_n, block_k, block_d, width = tile["BLOCK_N"], tile["BLOCK_K"], tile["BLOCK_D"], tile["WIDTH"]
    padded = triton.cdiv(codes, block_k) * block_k
    centre = torch.nn.functional.normalize(codebook, dim=-1) if cosine else codebook
    centre = torch.nan_to_num(centre.mean(1), 0.0, 0.0, 0.0)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    high, low = (empty(heads, padded, width, dtype=torch.bfloat16) for _ in range(2))
    bias, flipped = empty(heads, padded), empty(heads, dims, padded)
    limits = torch.zeros((heads, 2), dtype=torch.float32, device=x.device)
    undecided = empty(heads * rows, dtype=torch.int64)
    count = torch.zeros(1, dtype=torch.int64, device=x.device)
    warps, stages = tile["num_warps"], tile["num_stages"]
    with torch.cuda.device_of(x):
        prepare_kernel[(padded // 16, heads)](
            codebook, centre, high, low, bias, flipped, limits, codes, dims, padded,
            EUCLIDEAN=euclidean, COSINE=cosine, WIDTH=width, BLOCK_D=min(width, 32), BLOCK_K=16, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
        search_kernel[(triton.cdiv(rows, block_n), heads)](
            x, centre, high, low, bias, limits, indices, undecided, count, rows, codes, dims, padded,
            EUCLIDEAN=euclidean, WIDTH=width, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d, UPCAST=upcast,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        rescore_kernel[(min(heads * rows, RESCORERS),)](
            x, flipped, indices, undecided, count, rows, codes, dims, padded,
            EUCLIDEAN=euclidean, COSINE=cosine, BLOCK_K=128, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return indices


def tiles(dims: int) -> dict[str, int]:
    """Tile sizes by dimensions: WIDTH is D padded; BLOCK_D < WIDTH streams it."""
    width = triton.cdiv(dims, 32) * 32 if dims > 128 else max(16, triton.next_power_of_2(dims))
    rows = 128 if dims <= 32 else 64
    codes = 64 if dims <= 64 else 32
    tile = {"BLOCK_N": rows, "BLOCK_K": codes, "BLOCK_D": 32 if dims > 128 else width, "num_warps": 8, "num_stages": 2}
    return {**tile, "WIDTH": width}


def aot_configurations() -> list[dict]:
    """What is launched: every bucket of dimensions, the three kernels, the dtypes of x."""
    found = [_search("fp32", dims) for dims in (64, 8, 32, 128, 256, 768)] + [_search("bf16", 64), _search("fp16", 64)]
    sizes = dict.fromkeys(("codes", "dims", "padded"), "i32")
    for euclidean, cosine in ((True, False), (False, True), (False, False)):
        choice = {"EUCLIDEAN": euclidean, "COSINE": cosine}
        pointers = dict.fromkeys(("codebook", "centre"), "*fp32") | dict.fromkeys(("high", "low"), "*bf16")
        pointers |= dict.fromkeys(("bias", "flipped", "limits"), "*fp32")
        shape = {"WIDTH": 64, "BLOCK_D": 32, "BLOCK_K": 16}
        found.append(_configuration("prepare_kernel", pointers | sizes, choice | shape, 4, 3))
        pointers = {"x": "*fp32", "flipped": "*fp32", "indices": "*i64", "undecided": "*i64", "count": "*i64"}
        signature = pointers | {"rows": "i32"} | sizes
        found.append(_configuration("rescore_kernel", signature, choice | {"BLOCK_K": 128}, 4, 3))
    return found


def _search(dtype: str, dims: int) -> dict:
    tile = tiles(dims)
    pointers = {"x": f"*{dtype}", "centre": "*fp32", "high": "*bf16", "low": "*bf16", "bias": "*fp32"}
    pointers |= {"limits": "*fp32", "indices": "*i64", "undecided": "*i64", "count": "*i64"}
    sizes = dict.fromkeys(("rows", "codes", "dims", "padded"), "i32")
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    return _configuration(
        "search_kernel", pointers | sizes, {**tile, "EUCLIDEAN": True, "UPCAST": False}, warps, stages
    )


def _configuration(kernel: str, signature: dict, constexprs: dict, warps: int, stages: int) -> dict:
    return {
        "kernel": kernel,
        "name": " ".join(f"{name}={value}" for name, value in constexprs.items()),
        "signature": signature,
        "constexprs": constexprs,
        "divisible": [name for name, kind in signature.items() if kind.startswith("*") or name == "padded"],
        "num_warps": warps,
        "num_stages": stages,
    }
