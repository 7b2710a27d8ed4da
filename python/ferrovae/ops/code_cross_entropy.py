"""`code_cross_entropy`: -log softmax(-distance / temperature) at given codes, without the N x K matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ferrovae.ops import _checks, _codes
from ferrovae.ops.code_logsumexp import logsumexp
from ferrovae.ops.nearest_code import Metric
from ferrovae.ops.nearest_code_distances import nearest_code_distances


def code_cross_entropy(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    temperature: float | Tensor = 1.0,
    metric: Metric = "euclidean",
) -> Tensor:
    """distance(x, e_index) / temperature + log sum_k exp(-distance(x, e_k) / temperature): [..., D] -> [...], in nats.

    Args:
        x: [..., D] float32, float64, bfloat16 or float16; with heads [H, ..., D].
        codebook: [K, D], or [H, K, D] for one codebook a head; any of these dtypes.
        indices: int64 [...] ([H, ...] with heads), 0 to K - 1; a row of index -1 gives 0 and no gradient.
        temperature: positive; a number, or a tensor of one element, which then gets a gradient.
        metric: `"euclidean"`, `"sqeuclidean"`, `"cosine"` or `"dot"`, as for `code_logsumexp`.

    Returns:
        [...] float32; float64 where x or the codebook is. Differentiable in x, codebook and temperature, with
        `code_logsumexp`'s memory. A row that is not finite gives NaN, an index of a code that is not finite +infinity,
        both without gradient. No rows give an empty result.

    Raises:
        ValueError: as `code_logsumexp`; indices of another shape or device, or out of range (on a GPU and in compiled
            graphs such a row counts as -1: looking would wait for the device).
        TypeError: a dtype that is not floating point, or indices that are not int64.
    """
    name = "code_cross_entropy"
    rows, codes, scale, kernel_metric = _codes.prepared(name, x, codebook, temperature, metric)
    if _checks.tensor(name, "indices", indices).dtype != torch.int64:
        raise TypeError(f"{name}: indices are {indices.dtype}, expected int64")
    _checks.same_device(name, "indices", indices, "x", x)
    if indices.shape != x.shape[:-1]:
        expected = _checks.shape(x[..., 0])
        raise ValueError(f"{name}: indices are {_checks.shape(indices)}, expected {expected} to match x")
    size = codes.shape[1]
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
        least, most = int(indices.min()), int(indices.max())
        if least < -1 or most >= size:
            wrong = least if least < -1 else most
            raise ValueError(f"{name}: indices hold {wrong}, expected -1 to {size - 1}")
    given = indices.reshape(rows.shape[:2])
    ignored = (given < 0) | (given >= size)
    chosen = torch.where(ignored, 0, given).unsqueeze(-1)
    lse = logsumexp(rows, codes, scale, kernel_metric)
    far = nearest_code_distances(rows, codes, chosen, kernel_metric).squeeze(-1)
    # What is not finite is kept out of the quotient: 0 times infinity would reach the temperature's gradient.
    known = far.isfinite() & lse.isfinite()
    value = torch.where(known, far, 0.0) / scale + torch.where(known, lse, 0.0)
    value = torch.where(known, value, (far + lse).detach())
    return torch.where(ignored, 0.0, value).reshape(indices.shape)
