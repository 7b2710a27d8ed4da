"""The evidence's one door to the compiled extension, which is required here: there is no second implementation."""

from __future__ import annotations

import torch

try:
    from ferrovae import _core as core
except ImportError as error:
    raise ImportError(
        f"ferrovae.evidence needs the compiled extension ferrovae._core, which is missing ({error}): "
        "install the wheel, or run `make test` in a checkout"
    ) from error

__all__ = ["Row", "Weights", "good_khat"]

Row = tuple[float, float, float, float, float, float, bool, bool]
"""log mean, its standard error, mean, its standard error, effective sample size, k-hat, exact, reliable."""

good_khat = core.good_khat


class Weights:
    """Streaming statistics of [rows, samples] log weights: memory O(rows sqrt(samples)).

    Args:
        rows: examples. samples: log weights each will have been given by the time of `rows()`.
    """

    def __init__(self, rows: int, samples: int) -> None:
        self._core = core.LogWeights(rows, samples)

    def add(self, log_weights: torch.Tensor) -> tuple[int, int] | None:
        """Take the next columns, [rows, any] float32 or float64; return (row, column) of the first NaN or +inf."""
        values = log_weights.detach().cpu().contiguous()
        add = self._core.add_float64 if values.dtype == torch.float64 else self._core.add_float32
        bad = add((values.data_ptr(), values.numel()), torch.get_num_threads())
        return None if bad is None else divmod(bad, values.shape[1])

    def rows(self, precision: torch.dtype) -> list[Row]:
        """The statistics of every row. `precision` is the dtype the weights were computed in."""
        return self._core.summaries(torch.finfo(precision).eps, torch.get_num_threads())
