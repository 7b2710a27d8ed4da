"""log sum_k exp(-distance / temperature + bias) of every row, its gradients, and blocks of the softmax.

H heads of N rows and K codes, D dimensions, float32. The forward pass keeps a running maximum and sum a row; the
backward passes compute the softmax again from the stored result: one kernel over rows for dx, one over codes for
dcodes, each program the only one to write its tile, so no atomics. Wide vectors are cut into pieces of BLOCK_D, each
with programs of its own that compute the softmax anew. The bias is 0, or -infinity for a code that is left out.
"""

import torch
import triton
import triton.language as tl

from .code_scores import distances

_VARIES = ["rows", "count"]


@triton.jit(do_not_specialize=_VARIES)
def forward_kernel(
    x,
    codes,
    bias,
    temperature,
    lse,
    rows,
    count,
    dims,
    DOT: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """lse [H, N] of x [H, D, N] and codes [H, D, K]."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += head * dims * rows
    codes += head * dims * count
    inverse = 1.0 / tl.load(temperature)
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        far = distances(x, codes, n, k, rows, count, dims, DOT, ROOT, BLOCK_N, BLOCK_K)
        offset = tl.load(bias + head * count + k, mask=k < count, other=float("-inf"))
        score = offset[None, :] - far * inverse
        peak = tl.maximum(largest, tl.max(score, axis=1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(score - shift[:, None]), axis=1)
        largest = peak
    tl.store(lse + head * rows + n, largest + tl.log(total), mask=n < rows)


@triton.jit
def _softmax(
    x,
    codes,
    bias,
    lse,
    inverse,
    n,
    k,
    rows,
    count,
    dims,
    DOT: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Probabilities and distances [BLOCK_N, BLOCK_K]; 0 where the row's lse is not finite."""
    far = distances(x, codes, n, k, rows, count, dims, DOT, ROOT, BLOCK_N, BLOCK_K)
    offset = tl.load(bias + k, mask=k < count, other=float("-inf"))
    total = tl.load(lse + n, mask=n < rows, other=float("-inf"))
    known = tl.abs(total) < float("inf")
    score = offset[None, :] - far * inverse - tl.where(known, total, 0.0)[:, None]
    return tl.where(known[:, None], tl.exp(tl.minimum(score, 0.0)), 0.0), far


@triton.jit
def _slopes(probability, far, ROOT: tl.constexpr):
    """What the probabilities contribute to a gradient: over the distance where that is the root."""
    if ROOT:
        probability = tl.where(far > 0.0, probability / tl.where(far > 0.0, far, 1.0), 0.0)
    return probability


@triton.jit(do_not_specialize=_VARIES)
def probabilities_kernel(
    x,
    codes,
    bias,
    lse,
    temperature,
    probabilities,
    slopes,
    rows,
    count,
    dims,
    DOT: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """probabilities and slopes [N, K] (slopes with ROOT only) of x [D, N] and codes [D, K]."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inverse = 1.0 / tl.load(temperature)
    p, far = _softmax(x, codes, bias, lse, inverse, n, k, rows, count, dims, DOT, ROOT, BLOCK_N, BLOCK_K)
    place = n[:, None] * count + k[None, :]
    inside = (n < rows)[:, None] & (k < count)[None, :]
    tl.store(probabilities + place, p, mask=inside)
    if ROOT:
        tl.store(slopes + place, _slopes(p, far, ROOT), mask=inside)


@triton.jit(do_not_specialize=_VARIES)
def rows_kernel(
    x,
    codes,
    codes_by_row,
    bias,
    temperature,
    lse,
    grad,
    out,
    rows,
    count,
    dims,
    DOT: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out [H, D, N]: sum_k grad slope_k (e_k - x), or grad p_k e_k with DOT; codes_by_row is [H, K, D]."""
    head = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x += head * dims * rows
    codes += head * dims * count
    codes_by_row += head * dims * count
    inverse = 1.0 / tl.load(temperature)
    weight = tl.load(grad + head * rows + n, mask=n < rows, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    weights = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        p, far = _softmax(
            x, codes, bias + head * count, lse + head * rows, inverse, n, k, rows, count, dims, DOT, ROOT, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        slope = _slopes(p, far, ROOT)
        inside = (k < count)[:, None] & (d < dims)[None, :]
        code = tl.load(codes_by_row + k[:, None] * dims + d[None, :], mask=inside, other=0.0)
        total = tl.dot(slope, code, total, input_precision="ieee")
        weights += tl.sum(slope, axis=1)
    place = d[None, :].to(tl.int64) * rows + n[:, None]
    inside = (n < rows)[:, None] & (d < dims)[None, :]
    if not DOT:
        total -= weights[:, None] * tl.load(x + place, mask=inside, other=0.0)
    tl.store(out + head * dims * rows + place, total * weight[:, None], mask=inside)


@triton.jit(do_not_specialize=_VARIES)
def codes_kernel(
    x,
    codes,
    x_by_row,
    bias,
    temperature,
    lse,
    grad,
    out,
    rows,
    count,
    dims,
    DOT: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out [H, D, K]: sum_n grad slope_n (x_n - e), or grad p_n x_n with DOT; x_by_row is [H, N, D]."""
    head = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x += head * dims * rows
    codes += head * dims * count
    x_by_row += head * dims * rows
    inverse = 1.0 / tl.load(temperature)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    weights = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        p, far = _softmax(
            x, codes, bias + head * count, lse + head * rows, inverse, n, k, rows, count, dims, DOT, ROOT, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        slope = _slopes(p, far, ROOT) * tl.load(grad + head * rows + n, mask=n < rows, other=0.0)[:, None]
        inside = (n < rows)[:, None] & (d < dims)[None, :]
        row = tl.load(x_by_row + n[:, None] * dims + d[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(slope), row, total, input_precision="ieee")
        weights += tl.sum(slope, axis=0)
    place = d[None, :].to(tl.int64) * count + k[:, None]
    inside = (k < count)[:, None] & (d < dims)[None, :]
    if not DOT:
        total -= weights[:, None] * tl.load(codes + place, mask=inside, other=0.0)
    tl.store(out + head * dims * count + place, total, mask=inside)


def forward(
    x: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor, temperature: torch.Tensor, metric: str
) -> torch.Tensor:
    """lse [H, N] of contiguous x [H, N, D], codes [H, K, D], bias [H, K], temperature []."""
    lse = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    if lse.numel():
        tile = tiles()
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(x.shape[1], tile["BLOCK_N"]), x.shape[0])](
                _turned(x), _turned(codes), bias, temperature, lse, *_sizes(x, codes), **_choice(metric), **tile,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return lse


def probabilities(
    x: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor,
    lse: torch.Tensor,
    temperature: torch.Tensor,
    metric: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One head: probabilities and slopes [N, K] of x [N, D], codes [K, D], bias [K], lse [N]."""
    size = (x.shape[0], codes.shape[0])
    p = torch.empty(size, dtype=torch.float32, device=x.device)
    slopes = torch.empty(size if metric == "euclidean" else 1, dtype=torch.float32, device=x.device)
    tile = tiles()
    with torch.cuda.device_of(x):
        probabilities_kernel[(triton.cdiv(size[0], tile["BLOCK_N"]), triton.cdiv(size[1], tile["BLOCK_K"]))](
            _turned(x), _turned(codes), bias, lse, temperature, p, slopes, *size, x.shape[1], **_choice(metric), **tile,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return p, slopes if metric == "euclidean" else p


def backward(
    x: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor,
    temperature: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    metric: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in x [H, N, D] and codes [H, K, D] of sum(grad * lse)."""
    (heads, rows, dims), count = x.shape, codes.shape[1]
    if not rows:
        return torch.zeros_like(x), torch.zeros_like(codes)
    if metric != "dot":
        # Distances stay the same, and sums of e - x keep their digits.
        centre = codes.mean(1, keepdim=True)
        x, codes = x - centre, codes - centre
    x_turned, codes_turned = _turned(x), _turned(codes)
    of_x, of_codes = torch.empty_like(x_turned), torch.empty_like(codes_turned)
    lse, grad = lse.contiguous(), grad.contiguous()
    tile = gradient_tiles(dims)
    of_dims = triton.cdiv(dims, tile["BLOCK_D"])
    with torch.cuda.device_of(x):
        rows_kernel[(triton.cdiv(rows, tile["BLOCK_N"]), of_dims, heads)](
            x_turned, codes_turned, codes, bias, temperature, lse, grad, of_x, rows, count, dims, **_choice(metric),
            **tile, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        codes_kernel[(triton.cdiv(count, tile["BLOCK_K"]), of_dims, heads)](
            x_turned, codes_turned, x, bias, temperature, lse, grad, of_codes, rows, count, dims, **_choice(metric),
            **tile, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    factor = (2.0 if metric == "sqeuclidean" else 1.0) / temperature
    return (of_x * factor).transpose(1, 2).contiguous(), (of_codes * factor).transpose(1, 2).contiguous()


def tiles() -> dict[str, int]:
    """Rows and codes of a tile."""
    return {"BLOCK_N": 32, "BLOCK_K": 64}


def gradient_tiles(dims: int) -> dict[str, int]:
    """Rows, codes and dimensions of a tile of the gradients; larger ones spill."""
    return {"BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_D": 32 if dims <= 32 else 64}


def _turned(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.transpose(-1, -2).contiguous()


def _sizes(x: torch.Tensor, codes: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[1], codes.shape[1], x.shape[2]


def _choice(metric: str) -> dict[str, bool]:
    return {"DOT": metric == "dot", "ROOT": metric == "euclidean"}


def aot_configurations() -> list[dict]:
    """What is launched: every kernel, metric and piece."""
    found = []
    sizes = dict.fromkeys(("rows", "count", "dims"), "i32")
    for kernel, tensors in (
        ("rows_kernel", ("x", "codes", "codes_by_row", "bias", "temperature", "lse", "grad", "out")),
        ("codes_kernel", ("x", "codes", "x_by_row", "bias", "temperature", "lse", "grad", "out")),
        ("forward_kernel", ("x", "codes", "bias", "temperature", "lse")),
        ("probabilities_kernel", ("x", "codes", "bias", "lse", "temperature", "probabilities", "slopes")),
    ):
        for metric in ("euclidean", "sqeuclidean", "dot"):
            for dims in (64, 32) if tensors[-1] == "out" else (0,):
                constexprs = _choice(metric) | (gradient_tiles(dims) if dims else tiles())
                found.append(
                    {
                        "kernel": kernel,
                        "name": f"{metric} {dims}",
                        "signature": dict.fromkeys(tensors, "*fp32") | sizes,
                        "constexprs": constexprs,
                        "num_warps": 4,
                    }
                )
    return found
