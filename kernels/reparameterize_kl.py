"""Reparameterise and KL in one pass, and its gradient; the noise is drawn again in the backward pass, never stored.

N examples of D columns. A program holds a tile of about 2048 elements, 16 for each thread of 4 warps: several short
rows, or a piece of a long one, whose partial sums a second, ordered pass adds up. Everything is computed in float32.
mean and logvar are [N, O, I] with strides (row, segment, 1): O = 1 for separate tensors, the halves of [N, O, 2, I]
for moments. z and dz are [S, N, D]; the gradients have strides of the same kind.
"""

import torch
import triton
import triton.language as tl

from .philox import normals

TILE = 2048
_VARIES = ["examples", "samples", "first"]


@triton.jit
def _tile(columns, inner, SEGMENTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's rows int64 [BLOCK_N], columns [BLOCK_D], and where a column lies: segment, place in it."""
    blocks = tl.cdiv(columns, BLOCK_D)
    tile = tl.program_id(0)
    rows = (tile // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tile % blocks
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    groups = block * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)
    segment = cols * 0
    place = cols
    if SEGMENTED:
        segment = cols // inner
        place = cols % inner
    return rows, cols, groups, segment.to(tl.int64), place, block, blocks


@triton.jit
def _offsets(rows, segment, place, row_stride, segment_stride, SEGMENTED: tl.constexpr):
    offsets = place
    if SEGMENTED:
        offsets = place + segment * segment_stride
    return rows[:, None] * row_stride + offsets[None, :]


@triton.jit
def _ids(example_ids, rows, examples):
    ids = rows
    if example_ids is not None:
        ids = tl.load(example_ids + rows, mask=rows < examples, other=0)
    return ids


@triton.jit(do_not_specialize=_VARIES)
def forward_kernel(
    mean,
    logvar,
    seed,
    example_ids,
    z,
    kl,
    examples,
    columns,
    inner,
    mean_row,
    mean_segment,
    logvar_row,
    logvar_segment,
    samples,
    first,
    ELEMENTWISE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z and kl ([N, D], or [N, pieces of a row]); axis 1 of the grid shares out the samples."""
    rows, cols, groups, segment, place, block, blocks = _tile(columns, inner, SEGMENTED, BLOCK_N, BLOCK_D)
    inside = (rows < examples)[:, None] & (cols < columns)[None, :]
    m = tl.load(mean + _offsets(rows, segment, place, mean_row, mean_segment, SEGMENTED), mask=inside, other=0.0)
    lv = tl.load(logvar + _offsets(rows, segment, place, logvar_row, logvar_segment, SEGMENTED), mask=inside, other=0.0)
    m, lv = m.to(tl.float32), lv.to(tl.float32)
    std = tl.exp(lv * 0.5)
    if tl.program_id(1) == 0:
        terms = 0.5 * (m * m + (std * std - 1.0 - lv))
        if ELEMENTWISE:
            tl.store(kl + rows[:, None] * columns + cols[None, :], terms, mask=inside)
        else:
            total = tl.sum(tl.where(inside, terms, 0.0), axis=1)
            tl.store(kl + rows * blocks + block, total, mask=rows < examples)
    key = tl.load(seed)
    ids = _ids(example_ids, rows, examples)
    for sample in range(tl.program_id(1), samples, tl.num_programs(1)):
        eps = normals(key, groups, (first + sample).to(tl.uint32), ids, BLOCK_N, BLOCK_D)
        out = (examples.to(tl.int64) * sample + rows)[:, None] * columns + cols[None, :]
        tl.store(z + out, (m + std * eps).to(z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARIES)
def backward_kernel(
    mean,
    logvar,
    dz,
    dkl,
    seed,
    example_ids,
    dmean,
    dlogvar,
    examples,
    columns,
    inner,
    mean_row,
    mean_segment,
    logvar_row,
    logvar_segment,
    grad_row,
    grad_segment,
    samples,
    first,
    ELEMENTWISE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dmean and dlogvar from dz and dkl, either of which may be None; without dkl, mean is not read."""
    rows, cols, groups, segment, place, _, _ = _tile(columns, inner, SEGMENTED, BLOCK_N, BLOCK_D)
    inside = (rows < examples)[:, None] & (cols < columns)[None, :]
    lv = tl.load(logvar + _offsets(rows, segment, place, logvar_row, logvar_segment, SEGMENTED), mask=inside, other=0.0)
    std = tl.exp(lv.to(tl.float32) * 0.5)
    of_mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_logvar = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if dz is not None:
        key = tl.load(seed)
        ids = _ids(example_ids, rows, examples)
        for sample in range(samples):
            eps = normals(key, groups, (first + sample).to(tl.uint32), ids, BLOCK_N, BLOCK_D)
            where = (examples.to(tl.int64) * sample + rows)[:, None] * columns + cols[None, :]
            grad = tl.load(dz + where, mask=inside, other=0.0).to(tl.float32)
            of_mean += grad
            of_logvar += grad * eps
        of_logvar = of_logvar * std
    if dkl is not None:
        if ELEMENTWISE:
            weight = tl.load(dkl + rows[:, None] * columns + cols[None, :], mask=inside, other=0.0)
        else:
            weight = tl.load(dkl + rows, mask=rows < examples, other=0.0)[:, None]
        m = tl.load(mean + _offsets(rows, segment, place, mean_row, mean_segment, SEGMENTED), mask=inside, other=0.0)
        of_mean += weight * m.to(tl.float32)
        of_logvar += weight * (std * std - 1.0)
    to = _offsets(rows, segment, place, grad_row, grad_segment, SEGMENTED)
    tl.store(dmean + to, of_mean.to(dmean.dtype.element_ty), mask=inside)
    tl.store(dlogvar + to, (of_logvar * 0.5).to(dlogvar.dtype.element_ty), mask=inside)


def forward(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    seed: torch.Tensor,
    example_ids: torch.Tensor | None,
    samples: int,
    first: int,
    elementwise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z [S, N, D] and kl [N] (elementwise [N, D]) of mean and logvar [N, O, I], whose last stride is 1."""
    examples, segments, inner = mean.shape
    columns = segments * inner
    z = torch.empty((samples, examples, columns), dtype=mean.dtype, device=mean.device)
    block_n, block_d = tile(columns)
    pieces = -(-columns // block_d)
    width = columns if elementwise else pieces
    kl = torch.empty((examples, width), dtype=torch.float32, device=mean.device)
    if kl.numel():
        tiles = -(-examples // block_n) * pieces
        with torch.cuda.device_of(mean):
            # enough programs for every multiprocessor even when only the samples are many
            forward_kernel[(tiles, min(samples, max(1, 1024 // tiles)))](
                mean,
                logvar,
                seed,
                example_ids,
                z,
                kl,
                examples,
                columns,
                inner,
                *mean.stride()[:2],
                *logvar.stride()[:2],
                samples,
                first,
                ELEMENTWISE=elementwise,
                SEGMENTED=segments > 1,
                BLOCK_N=block_n,
                BLOCK_D=block_d,
                num_warps=4,
                enable_fp_fusion=True,
            )
    if elementwise:
        return z, kl
    return z, kl.view(examples) if pieces == 1 else kl.sum(1)


def backward(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    dz: torch.Tensor | None,
    dkl: torch.Tensor | None,
    seed: torch.Tensor,
    example_ids: torch.Tensor | None,
    samples: int,
    first: int,
    dmean: torch.Tensor,
    dlogvar: torch.Tensor,
) -> None:
    """Write dmean and dlogvar [N, O, I] (one pair of strides); dz and dkl are contiguous, or None."""
    examples, segments, inner = mean.shape
    columns = segments * inner
    if not dmean.numel():
        return
    block_n, block_d = tile(columns)
    with torch.cuda.device_of(mean):
        backward_kernel[(-(-examples // block_n) * -(-columns // block_d),)](
            mean,
            logvar,
            dz,
            dkl,
            seed,
            example_ids,
            dmean,
            dlogvar,
            examples,
            columns,
            inner,
            *mean.stride()[:2],
            *logvar.stride()[:2],
            *dmean.stride()[:2],
            samples,
            first,
            ELEMENTWISE=dkl is not None and dkl.ndim == 2,
            SEGMENTED=segments > 1,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )


def tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a program: powers of two, by the number of columns only."""
    block_d = min(TILE, max(4, triton.next_power_of_2(columns)))
    return TILE // block_d, block_d


def aot_configurations() -> list[dict]:
    """What is launched: both kernels, the dtypes, short, middling and long rows, moments in segments, element KL."""
    variants = [("fp32", 256, False, False), ("fp32", 4, False, False), ("fp32", 2048, False, False)]
    variants += [("bf16", 256, False, False), ("fp16", 256, False, False), ("fp32", 64, True, True)]
    return [
        _configuration(kernel, dtype, columns, segmented, elementwise)
        for dtype, columns, segmented, elementwise in variants
        for kernel in ("backward_kernel", "forward_kernel")
    ]


def _configuration(kernel: str, dtype: str, columns: int, segmented: bool, elementwise: bool) -> dict:
    value, number = f"*{dtype}", "i32"
    forwards = kernel == "forward_kernel"
    arguments = {"mean": value, "logvar": value}
    arguments |= {} if forwards else {"dz": value, "dkl": "*fp32"}
    arguments |= {"seed": "*i64", "example_ids": "*i64"}
    arguments |= {"z": value, "kl": "*fp32"} if forwards else {"dmean": value, "dlogvar": value}
    sizes = ["examples", "columns", "inner", "mean_row", "mean_segment", "logvar_row", "logvar_segment"]
    sizes += [] if forwards else ["grad_row", "grad_segment"]
    arguments |= dict.fromkeys([*sizes, "samples", "first"], number)
    block_n, block_d = tile(columns)
    return {
        "kernel": kernel,
        "name": f"{dtype} {block_n}x{block_d}{' segmented' * segmented}{' element' * elementwise}",
        "signature": arguments,
        "constexprs": {"ELEMENTWISE": elementwise, "SEGMENTED": segmented, "BLOCK_N": block_n, "BLOCK_D": block_d},
        "divisible": [name for name in arguments if name not in ("examples", "samples", "first")],
        "num_warps": 4,
    }
