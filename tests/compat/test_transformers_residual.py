"""A residual stack's codes are those of `residual_nearest_code`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ferrovae.compat.transformers.residual import residual_codes
from ferrovae.ops import residual_nearest_code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_codes_of_the_whole_stack(dtype: torch.dtype) -> None:
    codebooks = (torch.randn(5, 40, 8) * 0.6 ** torch.arange(5)[:, None, None]).to(dtype)
    x = torch.randn(2, 8, 50).to(dtype)
    stages = [SimpleNamespace(codebook=SimpleNamespace(embed=codebook)) for codebook in codebooks]
    expected, _ = residual_nearest_code(x.mT, codebooks)
    assert torch.equal(residual_codes(x, stages), expected.movedim(-1, 0))
