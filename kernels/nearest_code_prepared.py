"""Codebooks made ready for the search of `nearest_code`: centred, split into two bfloat16 parts, padded.

A codebook is prepared once and may be searched many times, as residual quantization and repeated lookups do.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from . import configurations
from .offsets import element

# Codebooks are padded to a multiple of this, or of BLOCK_K where that is more.
PADDING = 64


@triton.jit
def _bfloat16(value):
    """float32 rounded to the nearest bfloat16, to even; by bits, because interpreted conversions truncate."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _tf32(value):
    """float32 rounded to 11 significant bits, to even: whatever a tensor core then does to the rest changes nothing."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)


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
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """codebook [H, K, D] -> high, low [H, padded, WIDTH], bias [H, padded], flipped [H, D, padded], limits [H, 2].

    Faster precisions have the rounded codes in `high` and nothing in `low` and `flipped`.
    """
    head = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = codebook + element(head, k, codes, dims)[:, None]
    finite = k < codes
    square = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (k < codes)[:, None] & (d < dims)[None, :]
        value = tl.load(rows + d[None, :], mask=inside, other=0.0)
        finite = finite & (tl.max((tl.abs(value) < float("inf")).to(tl.int32) ^ 1, axis=1) == 0)
        square += tl.sum(value.to(tl.float64) * value.to(tl.float64), axis=1)
        if PRECISION == "exact":
            tl.store(flipped + element(head, d, dims, padded)[None, :] + k[:, None], value, mask=inside)
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
        where = element(head, k, padded, WIDTH)[:, None] + d[None, :]
        if PRECISION == "tf32":
            tl.store(high + where, _tf32(value.to(tl.float32)))
        else:
            hi, lo = _split(value.to(tl.float32))
            tl.store(high + where, hi.to(tl.bfloat16))
            if PRECISION == "exact":
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


@dataclass(frozen=True)
class Prepared:
    """H codebooks as `prepare_kernel` leaves them, and what they are searched by."""

    centre: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    bias: torch.Tensor
    flipped: torch.Tensor
    limits: torch.Tensor
    codes: int
    padded: int
    tile: dict[str, int]
    metric: str
    precision: str

    @property
    def euclidean(self) -> bool:
        """Whether codes are ordered by |x - e|."""
        return self.metric in ("euclidean", "sqeuclidean")

    def heads(self, first: int, last: int) -> "Prepared":
        """Some of the codebooks."""
        tensors = ("centre", "high", "low", "bias", "flipped", "limits")
        return replace(self, **{name: getattr(self, name)[first:last] for name in tensors})


def prepare(codebook: torch.Tensor, metric: str, precision: str = "exact") -> Prepared:
    """codebook [H, K, D] float32, contiguous, K and D at least 1, ready to be searched any number of times."""
    heads, codes, dims = codebook.shape
    tile = tiles(dims, configurations.architecture(codebook.device))
    block_k, width = tile["BLOCK_K"], tile["WIDTH"]
    padded = triton.cdiv(codes, max(block_k, PADDING)) * max(block_k, PADDING)
    usable = codebook.isfinite().all(-1, keepdim=True)
    centre = torch.where(usable, torch.nn.functional.normalize(codebook, dim=-1) if metric == "cosine" else codebook, 0)
    centre = torch.nan_to_num(centre.sum(1) / usable.sum(1).clamp(min=1), 0.0, 0.0, 0.0)
    if precision != "exact" and metric not in ("euclidean", "sqeuclidean"):
        # What is rounded is then the code itself.
        centre = torch.zeros_like(centre)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=codebook.device)

    exact = precision == "exact"
    if not exact and metric not in ("euclidean", "sqeuclidean"):
        # What is rounded is then the code itself.
        centre = torch.zeros_like(centre)
    high = empty(heads, padded, width, dtype=torch.float32 if precision == "tf32" else torch.bfloat16)
    low = torch.empty_like(high) if exact else high
    bias = empty(heads, padded)
    flipped = empty(heads, dims, padded) if exact else bias
    limits = torch.zeros((heads, 2), dtype=torch.float32, device=codebook.device)
    prepared = Prepared(centre, high, low, bias, flipped, limits, codes, padded, tile, metric, precision)
    prepare_kernel[(padded // 16, heads)](
        codebook, centre, high, low, bias, flipped, limits, codes, dims, padded,
        EUCLIDEAN=prepared.euclidean, COSINE=metric == "cosine", PRECISION=precision, WIDTH=width,
        BLOCK_D=min(width, 32), BLOCK_K=16, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return prepared


def tiles(dims: int, architecture: str) -> dict[str, int]:
    """Tile sizes by dimensions: WIDTH is D padded; BLOCK_D < WIDTH streams it."""
    width = triton.cdiv(dims, 32) * 32 if dims > 128 else max(16, triton.next_power_of_2(dims))
    shape_class = "wide" if dims > 128 else f"D{width}"
    return {**configurations.tiles("nearest_code", architecture, shape_class), "WIDTH": width}


def aot_configurations() -> list[dict]:
    """What is launched: each metric, and the precisions."""
    found = []
    for euclidean, cosine, precision in (
        (True, False, "exact"), (False, True, "exact"), (False, False, "exact"), (True, False, "tf32"),
        (True, False, "bf16"),
    ):  # fmt: skip
        parts = "*fp32" if precision == "tf32" else "*bf16"
        pointers = {"codebook": "*fp32", "centre": "*fp32", "high": parts, "low": parts}
        pointers |= dict.fromkeys(("bias", "flipped", "limits"), "*fp32")
        choice = {"EUCLIDEAN": euclidean, "COSINE": cosine, "PRECISION": precision}
        found.append(
            {
                "kernel": "prepare_kernel",
                "name": " ".join(f"{name}={value}" for name, value in choice.items()),
                "signature": pointers | dict.fromkeys(("codes", "dims", "padded"), "i32"),
                "constexprs": {**choice, "WIDTH": 64, "BLOCK_D": 32, "BLOCK_K": 16},
                "divisible": [*pointers, "padded"],
                "num_warps": 4,
            }
        )
    return found
