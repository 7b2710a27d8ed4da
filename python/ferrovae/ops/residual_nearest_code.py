"""`residual_nearest_code`: every row through Q codebooks, each searched for what the stages before it left over.

G groups, N rows, Q stages, K codes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from ferrovae.ops import _checks, _rust, _triton
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops._residual_nearest_code_gradients import register_gradients
from ferrovae.ops._residual_nearest_code_vmap import register_vmap
from ferrovae.ops.nearest_code import Metric
from ferrovae.ops.nearest_code import _reference as _nearest
from ferrovae.ops.nearest_code_distances import METRICS

_NAME = "residual_nearest_code"
Codebooks = Tensor | Sequence[Tensor]


@overload
def residual_nearest_code(
    x: Tensor,
    codebooks: Codebooks,
    *,
    metric: Metric = ...,
    stages: Tensor | None = ...,
    return_stages: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def residual_nearest_code(
    x: Tensor,
    codebooks: Codebooks,
    *,
    metric: Metric = ...,
    stages: Tensor | None = ...,
    return_stages: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
def residual_nearest_code(
    x: Tensor,
    codebooks: Codebooks,
    *,
    metric: Metric = "euclidean",
    stages: Tensor | None = None,
    return_stages: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """r_0 = x; i_q = argmin_k metric(r_q, e_q[k]); r_{q+1} = r_q - e_q[i_q]; quantized = sum_q e_q[i_q].

    Residual vector quantization (Juang and Gray, 1982; SoundStream, arXiv:2107.03312). Each i_q is exact as in
    `nearest_code`: the argmin of the metric in float64 on the values of r_q, ties to the lowest index. r_q and the sum
    are float32, rounded once a stage, the sum from 0 in the order of the stages (float64 if x or the codebooks are), so
    indices and sums are the same bits on every backend, instruction set and number of threads.

    Args:
        x: [..., D] float32, float64, bfloat16 or float16, values taken as they are; with groups [G, ..., D].
        codebooks: [Q, K, D]; [G, Q, K, D] for codebooks of each group; or Q tensors [K_q, D] of different sizes (they
            are padded to the largest). One codebook for all stages is `codebook.expand(Q, K, D)`, which is prepared
            once. Any of these dtypes; half precision is widened.
        metric: what each stage searches by, as in `nearest_code`; the code is subtracted as it is, whatever the metric.
        stages: int64, broadcasting to x's shape without D: how many stages a row goes through (quantizer dropout); 0
            or less is none, Q or more is all.
        return_stages: also return each stage's code vectors.

    Returns:
        indices int64 [..., Q] ([G, ..., Q] with groups), -1 at the stages that a row does not reach; quantized
        [..., D] float32 (or float64); with `return_stages` also the chosen codes [..., Q, D], zeros where dropped.

    quantized and the chosen codes are differentiable in the codebooks (each code gets the sum of its rows' gradients,
    in float64 and a fixed order), also twice. They are not in x: a straight-through gradient is the caller's affair.
    A row with a NaN gets index 0 at every stage, and quantized is, as always, the sum of the codes at its indices. An
    infinite row likewise goes by the rule of `nearest_code` at every stage. x with no rows gives empty results. `vmap`
    makes more rows of x, or more groups of codebooks. On a GPU, float64 runs in plain torch.

    Raises:
        ValueError: shapes that do not match, no stages, no codes, D = 0, an unknown metric, two devices.
        TypeError: x or a codebook is not floating point, stages are not int64, or one of them is no tensor.
    """
    books = _checked(x, codebooks, metric, stages)
    groups = x.shape[0] if books.ndim == 4 else 1
    if books.ndim == 3:
        books = books.unsqueeze(0)
    double = torch.float64 in (x.dtype, books.dtype)
    books = books.to(torch.float64 if double else torch.float32)
    leading, (depth, dims) = x.shape[:-1], (books.shape[1], x.shape[-1])
    rows = (x.double() if double else x).detach().reshape(groups, -1, dims)
    limits = None if stages is None else stages.expand(leading).reshape(groups, -1)
    quantized, codes, indices = _operation(rows, books, limits, metric, return_stages)
    indices, quantized = indices.reshape(*leading, depth), quantized.reshape(x.shape)
    if return_stages:
        return indices, quantized, codes.reshape(*leading, depth, dims)
    return indices, quantized


def _checked(x: Tensor, codebooks: Codebooks, metric: str, stages: Tensor | None) -> Tensor:
    """The codebooks as one tensor: [Q, K, D] or [G, Q, K, D]."""
    _checks.floating(_NAME, "x", x)
    _checks.choice(_NAME, "metric", metric, METRICS)
    if isinstance(codebooks, list | tuple):
        books = _stacked(x, codebooks)
    else:
        books = _checks.floating(_NAME, "codebooks", codebooks)
        _checks.same_device(_NAME, "codebooks", books, "x", x)
    if books.ndim not in (3, 4):
        raise ValueError(
            f"{_NAME}: codebooks is {_checks.shape(books)}, expected (Q, K, D), (G, Q, K, D) with groups, or a list"
        )
    if x.ndim < books.ndim - 2 or x.shape[-1] == 0:
        due = "..., D" if books.ndim == 3 else "G, ..., D"
        raise ValueError(f"{_NAME}: x is {_checks.shape(x)}, expected ({due}) with D >= 1")
    if books.shape[-1] != x.shape[-1] or (books.ndim == 4 and books.shape[0] != x.shape[0]):
        due = "" if books.ndim == 3 else f"{x.shape[0]}, "
        raise ValueError(
            f"{_NAME}: codebooks is {_checks.shape(books)}, expected ({due}Q, K, {x.shape[-1]}) "
            f"to match x {_checks.shape(x)}"
        )
    if books.shape[-3] == 0 or books.shape[-2] == 0:
        raise ValueError(f"{_NAME}: codebooks is {_checks.shape(books)}, expected at least one stage and one code")
    if stages is not None:
        _check_stages(x, stages)
    return books


def _check_stages(x: Tensor, stages: Tensor) -> None:
    if _checks.tensor(_NAME, "stages", stages).dtype != torch.int64:
        raise TypeError(f"{_NAME}: stages is {stages.dtype}, expected int64")
    _checks.same_device(_NAME, "stages", stages, "x", x)
    extra = x.ndim - 1 - stages.ndim
    if extra < 0 or any(mine not in (1, due) for mine, due in zip(stages.shape, x.shape[extra:-1], strict=True)):
        raise ValueError(
            f"{_NAME}: stages is {_checks.shape(stages)}, expected a shape that broadcasts to "
            f"{tuple(x.shape[:-1])}, that of x without D"
        )


def _stacked(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """[Q, K, D] of Q tensors [K_q, D]: the smaller ones end in codes of NaN, which are infinitely far."""
    if len(codebooks) == 0:
        raise ValueError(f"{_NAME}: codebooks is an empty list, expected at least one codebook")
    due = x.shape[-1] if x.ndim else "D"
    for q, book in enumerate(codebooks):
        name = f"codebooks[{q}]"
        _checks.floating(_NAME, name, book)
        _checks.same_device(_NAME, name, book, "x", x)
        if book.ndim != 2 or book.shape[0] == 0 or book.shape[1] != due:
            raise ValueError(f"{_NAME}: {name} is {_checks.shape(book)}, expected (K, {due}) with K >= 1 to match x")
    wide = torch.float64 if any(book.dtype == torch.float64 for book in codebooks) else torch.float32
    size = max(book.shape[0] for book in codebooks)
    return torch.stack([pad(book.to(wide), (0, 0, 0, size - book.shape[0]), value=torch.nan) for book in codebooks])


def _reference(
    x: Tensor, codebooks: Tensor, stages: Tensor | None, metric: str, return_stages: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning: x [G, N, D], codebooks [G, Q, K, D], stages [G, N] -> [G, N, D], [G, N, Q or 0, D], [G, N, Q]."""
    quantized, codes, indices = _fake(x, codebooks, stages, metric, return_stages)
    residual = x.to(codebooks.dtype)
    quantized.zero_()
    groups = torch.arange(x.shape[0], device=x.device)[:, None]
    for stage in range(codebooks.shape[1]):
        chosen = _nearest(residual, codebooks[:, stage], metric, 1, "exact")[..., 0]
        code = codebooks[groups, stage, chosen]
        if stages is not None:
            dropped = stages <= stage
            chosen, code = chosen.masked_fill(dropped, -1), code.masked_fill(dropped[..., None], 0.0)
        residual = residual - code
        quantized += code
        indices[..., stage] = chosen
        if return_stages:
            codes[:, :, stage] = code
    return quantized, codes, indices


def _distinct(codebooks: Tensor) -> Tensor:
    """[G, Q, K, D], or [G, 1, K, D] where all stages share one codebook; contiguous."""
    shared = codebooks.stride(1) == 0
    return (codebooks[:, :1] if shared else codebooks).contiguous()


def _rust_kernel(
    x: Tensor, codebooks: Tensor, stages: Tensor | None, metric: str, return_stages: bool
) -> tuple[Tensor, Tensor, Tensor]:
    results = quantized, codes, indices = _fake(x, codebooks, stages, metric, return_stages)
    x, books = x.contiguous(), _distinct(codebooks)
    limits = None if stages is None else stages.contiguous()
    sizes = (*indices.shape, *books.shape[1:])
    _rust.core.residual_nearest_code(
        str(x.dtype).removeprefix("torch."),
        _rust.span(x),
        _rust.span(books),
        None if limits is None else _rust.span(limits),
        sizes,
        metric,
        _rust.span(indices),
        _rust.span(quantized),
        _rust.span(codes),
        _rust.threads(),
    )
    return results


def _triton_kernel(
    x: Tensor, codebooks: Tensor, stages: Tensor | None, metric: str, return_stages: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _triton.kernels(_NAME)
    results = _fake(x, codebooks, stages, metric, return_stages)
    limits = None if stages is None else stages.contiguous()
    kernels.residual_nearest_code(
        x.contiguous(), _distinct(codebooks), limits, metric, *results, upcast=_triton.interpreted()
    )
    return results


def _fake(
    x: Tensor, codebooks: Tensor, stages: Tensor | None, metric: str, return_stages: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups, rows, dims = x.shape
    depth, dtype, device = codebooks.shape[1], codebooks.dtype, x.device
    return (
        torch.empty((groups, rows, dims), dtype=dtype, device=device),
        torch.empty((groups, rows, depth if return_stages else 0, dims), dtype=dtype, device=device),
        torch.empty((groups, rows, depth), dtype=torch.int64, device=device),
    )


_DTYPES = frozenset(_checks.FLOATS)
_operation = Operation(
    _NAME,
    "(Tensor x, Tensor codebooks, Tensor? stages, str metric, bool return_stages) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    rust=Kernel(_rust_kernel, _DTYPES),
    triton=Kernel(_triton_kernel, _DTYPES - {torch.float64}),
)
register_gradients(_operation)
register_vmap()
