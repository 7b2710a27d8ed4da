"""`nearest_code` against brute force in float64, on every backend that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import nearest_code

METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")
BACKENDS = ("reference", "rust")


def brute_force(x: torch.Tensor, codebook: torch.Tensor, metric: str, k: int = 1) -> np.ndarray:
    """The k nearest codes of every row, [N, k]: float64, one dimension after the other, stable order."""
    rows, codes = x.double().numpy(), codebook.double().numpy()
    scores = np.zeros((len(rows), len(codes)))
    squares = np.zeros(len(codes))
    with np.errstate(all="ignore"):
        for d in range(rows.shape[1]):
            if metric in ("euclidean", "sqeuclidean"):
                difference = rows[:, d, None] - codes[None, :, d]
                scores += difference * difference
            else:
                scores -= rows[:, d, None] * codes[None, :, d]
                squares += codes[:, d] * codes[:, d]
        if metric == "cosine":
            scores /= np.where(squares == 0, 1.0, np.sqrt(squares))
    return np.argsort(np.where(np.isnan(scores), np.inf, scores), axis=1, kind="stable")[:, :k]


def assert_nearest(x: torch.Tensor, codebook: torch.Tensor, metric: str, backend: str) -> None:
    with use_backend(backend):
        found = nearest_code(x, codebook, metric=metric)
    assert found.dtype == torch.int64
    assert found.shape == x.shape[:-1]
    np.testing.assert_array_equal(found.numpy(), brute_force(x, codebook, metric)[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "k", "d"), [(0, 3, 4), (1, 1, 1), (3, 17, 3), (64, 127, 8), (127, 64, 32), (17, 1000, 63)]
)
def test_agrees_with_brute_force(n, k, d, metric, backend):
    assert_nearest(torch.randn(n, d), torch.randn(k, d), metric, backend)
