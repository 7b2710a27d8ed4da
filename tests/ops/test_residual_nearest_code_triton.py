"""The Triton kernels of `residual_nearest_code`, interpreted, against its definition and the reference's gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import _triton, residual_nearest_code
from ops.test_residual_nearest_code import by_definition, codebooks_of, hard_case

pytest.importorskip("triton")
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.usefixtures("nan_filled_empty")]


@pytest.fixture(params=["staged", "fused"])
def _launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows take the fused kernels; here the others too."""
    if request.param == "staged":
        monkeypatch.setattr(_triton.kernels("residual_nearest_code_fused"), "ROWS", 0)


def assert_defined(x, books, metric: str = "euclidean") -> None:
    with use_backend("triton"):
        found = residual_nearest_code(x, books, metric=metric, return_stages=True)
    for ours, truth in zip(found, by_definition(x, books, metric), strict=True):
        np.testing.assert_array_equal(ours.numpy(), truth, strict=True)


@pytest.mark.parametrize(
    ("n", "q", "k", "d", "metric", "dtype"),
    [
        (0, 2, 3, 8, "euclidean", torch.float32),
        (1, 1, 1, 1, "dot", torch.float32),
        (3, 3, 17, 3, "cosine", torch.bfloat16),
        (17, 2, 65, 8, "euclidean", torch.float16),
        (7, 2, 33, 32, "sqeuclidean", torch.float32),
        (5, 2, 7, 63, "dot", torch.bfloat16),
        (3, 2, 9, 128, "cosine", torch.float32),
        (2, 2, 5, 130, "euclidean", torch.float32),
    ],
)
def test_agrees_with_the_definition(n, q, k, d, metric, dtype):
    assert_defined((torch.randn(n, d) + 1).to(dtype), codebooks_of(q, k, d), metric)


@pytest.mark.parametrize(
    ("_launches", "case", "metric"),
    [
        ("fused", "offset of 1000 sigma", "euclidean"),
        ("fused", "duplicates", "dot"),
        ("fused", "halfway on a grid", "euclidean"),
        ("fused", "not finite", "euclidean"),
        ("fused", "not finite", "dot"),
        ("staged", "scale 1e-5", "cosine"),
        ("staged", "strided", "euclidean"),
        ("staged", "not finite", "euclidean"),
    ],
    indirect=["_launches"],
)
@pytest.mark.usefixtures("_launches")
def test_hard_cases_are_exact(case, metric):
    x, books = hard_case(case)
    assert_defined(x[:12, :4], books[:, :20, :4], metric)


@pytest.mark.usefixtures("_launches")
@pytest.mark.parametrize("shared", [False, True])
def test_groups_limits_and_sharing(shared):
    x, stages = torch.randn(2, 9, 5), torch.randint(-1, 5, (2, 9))
    books = torch.randn(2, 1, 11, 5).expand(2, 3, 11, 5) if shared else torch.randn(2, 3, 11, 5)
    with use_backend("triton"):
        found = residual_nearest_code(x, books, stages=stages, return_stages=True)
    with use_backend("reference"):
        expected = residual_nearest_code(x, books, stages=stages, return_stages=True)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_codebooks_of_different_sizes():
    assert_defined(torch.randn(9, 4), [torch.randn(k, 4) for k in (20, 1, 7)])


def test_gradients():
    x, found = torch.randn(9, 5), []
    for backend in ("triton", "reference"):
        books = torch.ones(2, 11, 5).cumsum(1).sin().requires_grad_()
        with use_backend(backend):
            quantized = residual_nearest_code(x, books)[1]
        found.append(torch.autograd.grad(quantized.exp().sum(), books)[0])
    assert torch.equal(*found)
