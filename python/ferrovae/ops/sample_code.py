"""`sample_code`: a code of every row drawn from softmax(-distance / temperature), without the N x K matrix.

The Gumbel-max rule: with independent standard Gumbel numbers g_k, argmax_k (s_k + g_k) is a sample of softmax(s). The
noise is a function of (seed, code, head, row id), so no tiling, thread count or batch size changes a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ferrovae.ops import _checks, _codes, _philox, _rust, _triton
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops.nearest_code import Metric, nearest_code

_CHUNK = 1 << 18
# A temperature tensor of 0 counts as this: scores stay finite, and no noise matters beside them.
_SMALLEST = 1e-25


def sample_code(
    x: Tensor,
    codebook: Tensor,
    temperature: float | Tensor = 1.0,
    seed: Tensor | int | None = None,
    *,
    metric: Metric = "euclidean",
    row_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """k ~ softmax_k(-distance(x, e_k) / temperature): x [..., D], codebook [K, D] -> int64 [...].

    Args:
        x: [..., D] float32, float64, bfloat16 or float16; with heads [H, ..., D].
        codebook: [K, D], or [H, K, D] for one codebook a head; any of these dtypes.
        temperature: a number or a tensor of one element, not negative; at 0 the result is `nearest_code`'s.
        seed: the key of the noise, an int or an int64 tensor [1]. Without it a key is drawn from `generator`, or from
            torch's own generator of that device.
        metric: the distance: `"euclidean"` |x - e|, `"sqeuclidean"` |x - e|^2, `"cosine"` 1 - x.e / (|x| |e|), 1 where
            either vector is zero, `"dot"` -x.e.
        row_ids: int64 [...], x's shape without D (and without H): which stream of noise a row draws from. Default: its
            position, 0 to N - 1. Rows of one id and one seed share their noise; heads never do.
        generator: for eager use only.

    Returns:
        int64 [...] ([H, ...] with heads); not differentiable.

    The noise of code k is word k % 4 of Philox4x32-10 with key seed and counter (k // 4, head, row id low, row id
    high), u = (word + 1/2) / 2^32, g = -log(-log u) in float32. Backends draw the same code unless two candidates are
    closer than float32 tells apart; ties go to the lowest index. A code that is not finite is never drawn, unless there
    is no other. A row that is not finite gets index 0.

    Raises:
        ValueError: shapes that do not match, no codes, D = 0, an unknown metric, two devices, a negative temperature
            (a tensor's is looked at on a CPU only), seed and generator both given.
        TypeError: a dtype that is not floating point, or a seed or row ids that are not int64.
    """
    name = "sample_code"
    rows, codes = _codes.arguments(name, x.detach(), codebook.detach(), metric)
    scale = _codes.temperature(name, temperature, rows, zero=True)
    ids = _row_ids(name, row_ids, x, codebook, rows.shape[1])
    key = _checks.seed(name, seed, generator, x.device)
    if not isinstance(temperature, Tensor) and temperature == 0:
        return nearest_code(x, codebook, metric=metric)
    if metric == "cosine":
        rows, codes = _codes.unit(rows), _codes.unit(codes)
    indices = _operation(rows, codes, scale.detach(), key, ids, "dot" if metric == "cosine" else metric)
    return indices.reshape(x.shape[:-1])


def _row_ids(name: str, row_ids: Tensor | None, x: Tensor, codebook: Tensor, rows: int) -> Tensor:
    if row_ids is None:
        return torch.arange(rows, device=x.device)
    if _checks.tensor(name, "row_ids", row_ids).dtype != torch.int64:
        raise TypeError(f"{name}: row_ids are {row_ids.dtype}, expected int64")
    _checks.same_device(name, "row_ids", row_ids, "x", x)
    expected = x.shape[codebook.ndim - 2 : -1]
    if row_ids.shape != expected:
        raise ValueError(f"{name}: row_ids are {_checks.shape(row_ids)}, expected {tuple(expected)}, one a row of x")
    return row_ids.reshape(-1)


def _scale(temperature: Tensor) -> Tensor:
    if temperature.device.type == "cpu" and not float(temperature) >= 0:
        raise ValueError(f"sample_code: temperature is {float(temperature)}, expected 0 or a positive number")
    return temperature.clamp(min=_SMALLEST)


def _reference(x: Tensor, codebook: Tensor, temperature: Tensor, seed: Tensor, row_ids: Tensor, metric: str) -> Tensor:
    """The meaning: distances in float64, noise in float32."""
    x, codes, rows, bias = _codes.usable(x, codebook)
    scale = _scale(temperature).double()
    out = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    step = max(1, _CHUNK // codes.shape[1])
    for head in range(x.shape[0]):
        exact = codes[head].double()
        for first in range(0, x.shape[1], step):
            far = _codes.distances(x[head, first : first + step].double(), exact, metric)
            noise = _philox.gumbels(seed, row_ids[first : first + step], head, codes.shape[1])
            out[head, first : first + step] = (bias[head] - far / scale + noise).argmax(1)
    return out.masked_fill_(~rows | bias.isinf().all(1, keepdim=True), 0)


def _rust_kernel(
    x: Tensor, codebook: Tensor, temperature: Tensor, seed: Tensor, row_ids: Tensor, metric: str
) -> Tensor:
    if x.dtype == torch.float64:
        return _reference(x, codebook, temperature, seed, row_ids, metric)
    inverse = 1 / float(_scale(temperature))
    x, codes, rows, bias = _codes.usable(x, codebook)
    out, row_ids = torch.empty(x.shape[:2], dtype=torch.int64), row_ids.contiguous()
    spans = _rust.span(x), _rust.span(codes), _rust.span(bias)
    sizes = x.shape[0], x.shape[1], codes.shape[1], codes.shape[2]
    noise = int(seed), _rust.span(row_ids)
    _rust.core.sample_code(*spans, sizes, metric, inverse, noise, _rust.span(out), _rust.threads())
    return out.masked_fill_(~rows, 0)


def _triton_kernel(
    x: Tensor, codebook: Tensor, temperature: Tensor, seed: Tensor, row_ids: Tensor, metric: str
) -> Tensor:
    if x.dtype == torch.float64:
        return _reference(x, codebook, temperature, seed, row_ids, metric)
    x, codes, rows, bias = _codes.usable(x, codebook)
    kernels = _triton.kernels("sample_code")
    out: Tensor = kernels.sample_code(x, codes, bias, _scale(temperature), seed, row_ids.contiguous(), metric)
    return out.masked_fill_(~rows, 0)


_operation = Operation(
    "sample_code",
    "(Tensor x, Tensor codebook, Tensor temperature, Tensor seed, Tensor row_ids, str metric) -> Tensor",
    reference=_reference,
    fake=lambda x, *_: x.new_empty(x.shape[:2], dtype=torch.int64),
    rust=Kernel(_rust_kernel, _codes.KERNEL_DTYPES),
    triton=Kernel(_triton_kernel, _codes.KERNEL_DTYPES),
)
