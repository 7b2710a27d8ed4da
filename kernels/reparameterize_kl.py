"""Reparameterise and KL in one pass, and its gradient; the noise is drawn again in the backward pass, never stored.

N examples of D columns. A program holds a tile of about 2048 elements, 16 for each thread of 4 warps: several short
rows, or a piece of a long one, whose partial sums a second, ordered pass adds up. Everything is computed in float32.
mean and logvar are [N, O, I] with strides (row, segment, 1): O = 1 for separate tensors, the halves of [N, O, 2, I]
for moments. z and dz are [S, N, D]; the gradients have strides of the same kind. A parameter of the prior is [N, D],
or one row with a row stride of 0, whose gradient each program sums over a run of tiles; a second pass adds the runs.
"""

import torch
import triton
import triton.language as tl

from .philox import normals

TILE = 2048
RUNS = 256  # of tiles below each other, at most, when the gradient of a shared prior is summed over the rows
_VARIES = ["examples", "samples", "first"]


@triton.jit
def _tile(tile, columns, inner, SEGMENTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile's rows int64 [BLOCK_N], columns [BLOCK_D], and where a column lies: segment, place in it."""
    blocks = tl.cdiv(columns, BLOCK_D)
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


@triton.jit
def _excess(x, exponential):
    """exp(x) - 1, given exp(x), without cancellation near 0."""
    series = x * 1.9841270e-4 + 1.3888889e-3
    series = series * x + 8.3333333e-3
    series = series * x + 4.1666667e-2
    series = series * x + 1.6666667e-1
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 0.35, series * x * x + x, exponential - 1.0)


@triton.jit
def _prior(parameter, rows, cols, stride, inside):
    """A parameter of the prior, or 0."""
    value = tl.zeros(inside.shape, tl.float32)
    if parameter is not None:
        value = tl.load(parameter + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=_VARIES)
def forward_kernel(
    mean,
    logvar,
    prior_mean,
    prior_logvar,
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
    prior_mean_row,
    prior_logvar_row,
    samples,
    first,
    ELEMENTWISE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z and kl ([N, D], or [N, pieces of a row]); axis 1 of the grid shares out the samples."""
    tile = tl.program_id(0)
    rows, cols, groups, segment, place, block, blocks = _tile(tile, columns, inner, SEGMENTED, BLOCK_N, BLOCK_D)
    inside = (rows < examples)[:, None] & (cols < columns)[None, :]
    m = tl.load(mean + _offsets(rows, segment, place, mean_row, mean_segment, SEGMENTED), mask=inside, other=0.0)
    lv = tl.load(logvar + _offsets(rows, segment, place, logvar_row, logvar_segment, SEGMENTED), mask=inside, other=0.0)
    m, lv = m.to(tl.float32), lv.to(tl.float32)
    std = tl.exp(lv * 0.5)
    if tl.program_id(1) == 0:
        distance = m
        ratio = lv
        variances = std * std
        if prior_mean is not None:
            distance = m - _prior(prior_mean, rows, cols, prior_mean_row, inside)
        if prior_logvar is not None:
            plv = _prior(prior_logvar, rows, cols, prior_logvar_row, inside)
            distance = distance * tl.exp(plv * -0.5)
            ratio = lv - plv
            variances = tl.exp(ratio)
        terms = 0.5 * (distance * distance + (_excess(ratio, variances) - ratio))
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


@triton.jit
def _backward_tile(
    tile,
    mean,
    logvar,
    prior_mean,
    prior_logvar,
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
    prior_mean_row,
    prior_logvar_row,
    grad_row,
    grad_segment,
    samples,
    first,
    ELEMENTWISE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes a tile of dmean and dlogvar; returns the prior's, 0 outside, and where they belong."""
    rows, cols, groups, segment, place, _, _ = _tile(tile, columns, inner, SEGMENTED, BLOCK_N, BLOCK_D)
    inside = (rows < examples)[:, None] & (cols < columns)[None, :]
    lv = tl.load(logvar + _offsets(rows, segment, place, logvar_row, logvar_segment, SEGMENTED), mask=inside, other=0.0)
    lv = lv.to(tl.float32)
    std = tl.exp(lv * 0.5)
    of_mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_logvar = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_prior_mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_prior_logvar = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
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
        distance = m.to(tl.float32) - _prior(prior_mean, rows, cols, prior_mean_row, inside)
        ratio = lv
        variances = std * std
        pull = weight * distance
        if prior_logvar is not None:
            plv = _prior(prior_logvar, rows, cols, prior_logvar_row, inside)
            inverse = tl.exp(plv * -0.5)
            distance = distance * inverse
            ratio = lv - plv
            variances = tl.exp(ratio)
            pull = weight * distance * inverse
        excess = _excess(ratio, variances)
        of_mean += pull
        of_logvar += weight * excess
        of_prior_mean = tl.where(inside, -pull, 0.0)
        of_prior_logvar = tl.where(inside, weight * (distance * distance + excess) * -0.5, 0.0)
    to = _offsets(rows, segment, place, grad_row, grad_segment, SEGMENTED)
    tl.store(dmean + to, of_mean.to(dmean.dtype.element_ty), mask=inside)
    tl.store(dlogvar + to, (of_logvar * 0.5).to(dlogvar.dtype.element_ty), mask=inside)
    return of_prior_mean, of_prior_logvar, rows, cols, inside


@triton.jit(do_not_specialize=[*_VARIES, "depth"])
def backward_kernel(
    mean,
    logvar,
    prior_mean,
    prior_logvar,
    dz,
    dkl,
    seed,
    example_ids,
    dmean,
    dlogvar,
    dprior_mean,
    dprior_logvar,
    examples,
    columns,
    inner,
    mean_row,
    mean_segment,
    logvar_row,
    logvar_segment,
    prior_mean_row,
    prior_logvar_row,
    grad_row,
    grad_segment,
    samples,
    first,
    depth,
    ELEMENTWISE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dmean and dlogvar from dz and dkl, either of which may be None; without dkl, mean is not read.

    dprior_mean and dprior_logvar may be None; SHARED makes them [runs, D] of float32, the sums over `depth` tiles.
    """
    # fmt: off
    if SHARED:
        blocks = tl.cdiv(columns, BLOCK_D)
        run = tl.program_id(0) // blocks
        block = tl.program_id(0) % blocks
        tiles = tl.cdiv(examples, BLOCK_N)
        of_mean = tl.zeros([BLOCK_D], tl.float32)
        of_logvar = tl.zeros([BLOCK_D], tl.float32)
        for step in range(run * depth, tl.minimum(tiles, run * depth + depth)):
            first_part, second_part, _, _, _ = _backward_tile(
                step * blocks + block, mean, logvar, prior_mean, prior_logvar, dz, dkl, seed, example_ids, dmean,
                dlogvar, examples, columns, inner, mean_row, mean_segment, logvar_row, logvar_segment, prior_mean_row,
                prior_logvar_row, grad_row, grad_segment, samples, first, ELEMENTWISE, SEGMENTED, BLOCK_N, BLOCK_D,
            )
            of_mean += tl.sum(first_part, axis=0)
            of_logvar += tl.sum(second_part, axis=0)
        cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
        to = run.to(tl.int64) * columns + cols
        if dprior_mean is not None:
            tl.store(dprior_mean + to, of_mean, mask=cols < columns)
        if dprior_logvar is not None:
            tl.store(dprior_logvar + to, of_logvar, mask=cols < columns)
    else:
        first_part, second_part, rows, cols, inside = _backward_tile(
            tl.program_id(0), mean, logvar, prior_mean, prior_logvar, dz, dkl, seed, example_ids, dmean, dlogvar,
            examples, columns, inner, mean_row, mean_segment, logvar_row, logvar_segment, prior_mean_row,
            prior_logvar_row, grad_row, grad_segment, samples, first, ELEMENTWISE, SEGMENTED, BLOCK_N, BLOCK_D,
        )
        to = rows[:, None] * columns + cols[None, :]
        if dprior_mean is not None:
            tl.store(dprior_mean + to, first_part.to(dprior_mean.dtype.element_ty), mask=inside)
        if dprior_logvar is not None:
            tl.store(dprior_logvar + to, second_part.to(dprior_logvar.dtype.element_ty), mask=inside)
    # fmt: on


def forward(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    prior_mean: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    seed: torch.Tensor,
    example_ids: torch.Tensor | None,
    samples: int,
    first: int,
    elementwise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z [S, N, D] and kl [N] (elementwise [N, D]) of mean and logvar [N, O, I], whose last stride is 1; so is that of
    the prior's parameters, [N, D] or [1, D] or None."""
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
                prior_mean,
                prior_logvar,
                seed,
                example_ids,
                z,
                kl,
                examples,
                columns,
                inner,
                *mean.stride()[:2],
                *logvar.stride()[:2],
                _row_stride(prior_mean),
                _row_stride(prior_logvar),
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
    prior_mean: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    dz: torch.Tensor | None,
    dkl: torch.Tensor | None,
    seed: torch.Tensor,
    example_ids: torch.Tensor | None,
    samples: int,
    first: int,
    dmean: torch.Tensor,
    dlogvar: torch.Tensor,
    dprior_mean: torch.Tensor | None,
    dprior_logvar: torch.Tensor | None,
) -> None:
    """Write dmean and dlogvar [N, O, I] (one pair of strides) and the prior's gradients, as long as its parameters, or
    None; dz and dkl are contiguous, or None."""
    examples, segments, inner = mean.shape
    columns = segments * inner
    wanted = [gradient for gradient in (dprior_mean, dprior_logvar) if gradient is not None]
    if not dmean.numel():
        for gradient in wanted:
            gradient.zero_()
        return
    shared = examples > 1 and bool(wanted) and all(gradient.shape[0] == 1 for gradient in wanted)
    block_n, block_d = tile(columns, shared)
    pieces, tiles = -(-columns // block_d), -(-examples // block_n)
    depth = -(-tiles // RUNS) if shared else 1
    runs = -(-tiles // depth)
    # what is written: [runs, D] of partial sums; [N, D] where one parameter is shared and the other is not
    rows = runs if shared else examples
    parts = [_parts(gradient, rows) for gradient in (dprior_mean, dprior_logvar)]
    with torch.cuda.device_of(mean):
        backward_kernel[(runs * pieces,)](
            mean,
            logvar,
            prior_mean,
            prior_logvar,
            dz,
            dkl,
            seed,
            example_ids,
            dmean,
            dlogvar,
            *parts,
            examples,
            columns,
            inner,
            *mean.stride()[:2],
            *logvar.stride()[:2],
            _row_stride(prior_mean),
            _row_stride(prior_logvar),
            *dmean.stride()[:2],
            samples,
            first,
            depth,
            ELEMENTWISE=dkl is not None and dkl.ndim == 2,
            SEGMENTED=segments > 1,
            SHARED=shared,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
    for gradient, part in zip((dprior_mean, dprior_logvar), parts, strict=True):
        if gradient is not None and part is not gradient:
            gradient.copy_(part.sum(0, keepdim=True))


def _row_stride(parameter: torch.Tensor | None) -> int:
    return 0 if parameter is None or parameter.shape[0] == 1 else parameter.stride(0)


def _parts(gradient: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """The gradient itself, or room for float32 parts of it."""
    if gradient is None or gradient.shape[0] == rows:
        return gradient
    return torch.empty((rows, gradient.shape[1]), dtype=torch.float32, device=gradient.device)


def tile(columns: int, shared: bool = False) -> tuple[int, int]:
    """Rows and columns of a program: powers of two, by the number of columns only.

    A quarter of a tile where a loop over tiles keeps sums as well: a whole one spills.
    """
    size = TILE // 4 if shared else TILE
    block_d = min(size, max(4, triton.next_power_of_2(columns)))
    return size // block_d, block_d


def aot_configurations() -> list[dict]:
    """What is launched: both kernels, the dtypes, short, middling and long rows, moments in segments, element KL, a
    prior of every example and one that they share."""
    variants = [("fp32", 256, ""), ("fp32", 4, ""), ("fp32", 2048, ""), ("bf16", 256, ""), ("fp16", 256, "")]
    variants += [("fp32", 64, "segmented element"), ("fp32", 256, "prior"), ("bf16", 256, "prior")]
    variants += [("fp32", 4, "shared"), ("fp32", 256, "shared"), ("bf16", 2048, "shared")]
    return [
        _configuration(kernel, dtype, columns, variant)
        for dtype, columns, variant in variants
        for kernel in ("backward_kernel", "forward_kernel")
        if kernel == "backward_kernel" or variant != "shared"
    ]


def _configuration(kernel: str, dtype: str, columns: int, variant: str) -> dict:
    value, number = f"*{dtype}", "i32"
    forwards, given, shared = kernel == "forward_kernel", variant in ("prior", "shared"), variant == "shared"
    arguments = {"mean": value, "logvar": value}
    arguments |= dict.fromkeys(("prior_mean", "prior_logvar"), value if given else None)
    arguments |= {} if forwards else {"dz": value, "dkl": "*fp32"}
    arguments |= {"seed": "*i64", "example_ids": "*i64"}
    arguments |= {"z": value, "kl": "*fp32"} if forwards else {"dmean": value, "dlogvar": value}
    if not forwards:
        part = "*fp32" if shared else value
        arguments |= dict.fromkeys(("dprior_mean", "dprior_logvar"), part if given else None)
    sizes = ["examples", "columns", "inner", "mean_row", "mean_segment", "logvar_row", "logvar_segment"]
    sizes += ["prior_mean_row", "prior_logvar_row"]
    sizes += [] if forwards else ["grad_row", "grad_segment"]
    arguments |= dict.fromkeys([*sizes, "samples", "first", *([] if forwards else ["depth"])], number)
    block_n, block_d = tile(columns, shared)
    constants = {"ELEMENTWISE": "element" in variant, "SEGMENTED": "segmented" in variant}
    constants |= {} if forwards else {"SHARED": shared}
    free = ("examples", "samples", "first", "depth")
    return {
        "kernel": kernel,
        "name": f"{dtype} {block_n}x{block_d} {variant}".strip(),
        "signature": arguments,
        "constexprs": {**constants, "BLOCK_N": block_n, "BLOCK_D": block_d},
        "divisible": [name for name, kind in arguments.items() if kind is not None and name not in free],
        "num_warps": 4,
    }
