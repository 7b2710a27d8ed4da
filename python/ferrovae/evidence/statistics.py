"""Statistics of importance weights, for weights computed elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ferrovae.evidence import _rust


class Statistics(NamedTuple):
    """Of each row of log weights L_1 .. L_K, w = exp L; float64 [N] or bool [N].

    log_mean: `log(sum w / K)`; its standard error by the delta method, NaN where not `reliable` (withheld).
    mean: mean of L; its standard error.
    ess: `(sum w)^2 / sum w^2`, between 1 and K (0 when all weights are 0).
    khat: shape of the generalised Pareto distribution fitted to the `M = ceil(min(K/5, 3 sqrt K))` largest weights;
        0 for constant weights, NaN where fewer than 5 weights make the tail.
    exact: the weights are constant up to rounding, so `log_mean` has no Monte Carlo error.
    reliable: exact, or k-hat at most `min(1 - 1/log10 K, 0.7)`.
    """

    log_mean: torch.Tensor
    standard_error: torch.Tensor
    mean: torch.Tensor
    mean_standard_error: torch.Tensor
    ess: torch.Tensor
    khat: torch.Tensor
    exact: torch.Tensor
    reliable: torch.Tensor


def from_rows(rows: list[_rust.Row]) -> Statistics:
    """The columns of what Rust returns, as tensors."""
    columns = list(zip(*rows, strict=True)) or [()] * len(Statistics._fields)
    dtypes = [torch.float64] * 6 + [torch.bool] * 2
    return Statistics(*(torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def log_weight_statistics(log_weights: torch.Tensor) -> Statistics:
    """How large the mean of importance weights is, and whether to believe it.

    Args:
        log_weights: (N, K) float32 or float64 on any device, in nats; -inf is a weight of 0.

    Raises:
        TypeError, ValueError: another dtype or shape, or a NaN or +inf, whose place is named.

    Source: Vehtari et al., "Pareto smoothed importance sampling" (JMLR 2024) for k-hat and its threshold.
    """
    if log_weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"log_weight_statistics: log_weights is {log_weights.dtype}, expected float32 or float64")
    if log_weights.ndim != 2 or log_weights.shape[1] == 0:
        raise ValueError(f"log_weight_statistics: log_weights is {tuple(log_weights.shape)}, expected (N, K), K >= 1")
    if len(log_weights) == 0:
        return from_rows([])
    weights = _rust.Weights(*log_weights.shape)
    bad = weights.add(log_weights)
    if bad is not None:
        value = float(log_weights[bad])
        raise ValueError(f"log_weight_statistics: log_weights is {value} at row {bad[0]}, sample {bad[1]}")
    return from_rows(weights.rows(log_weights.dtype))
