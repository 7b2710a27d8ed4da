"""The named faster precisions of `nearest_code`: what they compute, and how far they may be from the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import nearest_code
from ferrovae.ops._nearest_code_rounded import rounded

BITS = {"tf32": 11, "bf16": 8}


def significant(value: np.ndarray, bits: int) -> np.ndarray:
    """float64 rounded to so many significant bits, ties to even."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.rint(mantissa * 2.0**bits), exponent - bits)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_rounds_to_that_many_bits(precision):
    value = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1.0, 1 + 2**-9, 1 + 3 * 2**-12, 3e38, 65535.0])])
    expected = significant(value.double().numpy(), BITS[precision])
    np.testing.assert_array_equal(rounded(value, precision).double().numpy(), expected)
    special = rounded(torch.tensor([float("nan"), float("inf"), -float("inf")]), precision)
    assert special[0].isnan()
    assert special[1:].tolist() == [float("inf"), -float("inf")]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("backend", ["reference", "rust", "triton"])
def test_finds_a_code_that_is_nearest_to_that_precision(metric, precision, backend):
    x, codebook = torch.randn(60, 12) + 5, torch.randn(90, 12) + 5
    with use_backend(backend):
        found = nearest_code(x, codebook, metric=metric, precision=precision)
    codes = codebook.double()
    if metric == "cosine":
        codes = codes / codes.norm(dim=1, keepdim=True)
    rows = x.double()
    if metric == "euclidean":
        rows, codes = rows - codes.mean(0), codes - codes.mean(0)
        scores = codes.square().sum(1) / 2 - rows @ codes.T
    else:
        scores = -rows @ codes.T
    regret = scores.gather(1, found[:, None])[:, 0] - scores.amin(1)
    # Two operands, each off by half a unit in the last place, and as much again for the code that lost.
    bound = 4 * 2.0 ** -BITS[precision] * rows.norm(dim=1) * codes.norm(dim=1).max()
    assert (regret <= bound).all()
    agreement = (found == nearest_code(x, codebook, metric=metric)).float().mean()
    assert agreement > (0.95 if precision == "tf32" else 0.8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("backend", ["reference", "rust", "triton"])
def test_ties_and_what_is_not_finite_are_as_in_the_exact_search(backend):
    x, codebook = torch.randn(20, 4), torch.randn(7, 4).repeat(3, 1)
    codebook[0, 1], x[3, 2] = float("nan"), float("nan")
    with use_backend(backend):
        found = nearest_code(x, codebook, precision="bf16")
    # Code 0 is lost, but its first copy is code 7.
    assert found[3] == 0
    others = found[[row for row in range(20) if row != 3]]
    assert ((others > 0) & (others <= 7)).all()


def test_several_results_and_double_precision_rows():
    x, codebook = torch.randn(9, 3), torch.randn(11, 3)
    found = nearest_code(x, codebook, precision="tf32", topk=4)
    assert torch.equal(found[:, 0], nearest_code(x.double(), codebook, precision="tf32"))
    assert (found.sort(1).values.diff() > 0).all()
