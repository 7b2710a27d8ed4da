"""Sequential: one quantizer among layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ferrovae.nn import FSQ, LatentQuantize, ResidualFSQ, Sequential, VectorQuantize


def test_the_first_result_goes_on_and_the_others_come_last():
    first, quantizer, last = nn.Linear(5, 4), VectorQuantize(4, 7), nn.Linear(4, 2)
    chain = Sequential(first, quantizer, last).eval()
    x = torch.randn(2, 6, 5)
    mask = torch.rand(2, 6) > 0.5
    quantized, indices, loss = quantizer(first(x), mask=mask)
    results = chain(x, mask=mask)
    assert isinstance(results, tuple)
    torch.testing.assert_close(results, (last(quantized), indices, loss))


def test_exactly_one_quantizer():
    with pytest.raises(ValueError, match="0 of 1 layers are quantizers"):
        Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="2 of 3 layers are quantizers"):
        Sequential(FSQ([5, 5]), nn.Identity(), VectorQuantize(2, 3))
    with pytest.raises(ValueError, match="2 of 2 layers"):
        Sequential(LatentQuantize(3, 2, codebook_dim=2), ResidualFSQ(levels=[3], num_quantizers=2))


def test_compiles_into_one_graph():
    chain = Sequential(nn.Linear(5, 2), FSQ([5, 5]), nn.Linear(2, 5))
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 5)
    torch.testing.assert_close(compiled(x), chain(x))
