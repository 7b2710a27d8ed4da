"""The scores whose error is measured on a GPU, in the interpreter: three products of the parts, to their own error."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("measured there", allow_module_level=True)


@pytest.mark.parametrize(("rows", "codes", "dims"), [(1, 1, 1), (65, 70, 16), (3, 130, 33)])
def test_error_is_that_of_the_parts(rows: int, codes: int, dims: int) -> None:
    from ferrovae.kernels.bf16x3_score import scores

    x, codebook = torch.randn(rows, dims), torch.randn(codes, dims)
    exact = x.double() @ codebook.double().T
    size = x.double().norm(dim=1)[:, None] * codebook.double().norm(dim=1)
    error = ((scores(x, codebook, upcast=True).double() - exact).abs() / size).max()
    assert error < 2**-15
    one_product = x.bfloat16().double() @ codebook.bfloat16().double().T
    assert ((one_product - exact).abs() / size).max() > 2**-15
