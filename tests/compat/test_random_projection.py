"""The random-projection quantizer of vector-quantize-pytorch, held against itself."""

from __future__ import annotations

import pytest
import torch

from ferrovae.compat.random_projection import RandomProjectionQuantizer

upstream = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_same_state_same_indices_same_loss(heads, norm):
    options = {"dim": 12, "codebook_size": 16, "codebook_dim": 5, "num_codebooks": heads, "norm": norm}
    theirs, ours = upstream.RandomProjectionQuantizer(**options), RandomProjectionQuantizer(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 30, 12)
    indices = ours(x)
    assert torch.equal(indices, theirs(x))
    targets = torch.randint(-1, 16, indices.shape)
    torch.testing.assert_close(ours(x, indices=targets), theirs(x, indices=targets))
