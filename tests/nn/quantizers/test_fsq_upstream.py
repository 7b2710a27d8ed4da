"""Where `FSQ` differs from vector-quantize-pytorch's; `test_fsq_pairwise` has what is equal.

- `noise_dropout`: the peer adds noise to half of the elements whatever the probability;
- indices from 2^24 codes on: the peer sums them in float32;
- layers that rotate: the peer raises in half precision and where it rounded to float32, and rotates the codes in
  bfloat16 under autocast;
- decoding by a layer with projections that is not float32: the peer raises;
- a vector with a NaN: the peer's index is what the platform makes of a NaN as an integer.
"""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import FSQ
from nn.quantizers.scalar_upstream import twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)


def test_the_peer_adds_noise_to_half_of_the_elements():
    options = {"levels": [5, 5], "preserve_symmetry": True, "noise_dropout": 0.1}
    x = torch.zeros(1, 20_000, 2)
    changed = [(layer(x)[0] != 0).float().mean() for layer in twins(upstream.FSQ, FSQ, options)]
    assert abs(changed[0] - 0.5) < 0.02
    assert abs(changed[1] - 0.1) < 0.01


def test_the_peer_rounds_large_indices():
    peer, layer = upstream.FSQ([1000, 1000, 1000], return_indices=False), FSQ([1000, 1000, 1000])
    codes = layer.quantize(torch.randn(500, 3))
    right = (((codes.double() * 500).round() + 500) * torch.tensor([1.0, 1e3, 1e6]).double()).sum(-1)
    assert torch.equal(layer.codes_to_indices(codes), right.int())
    assert (peer.codes_to_indices(codes) != right).double().mean() > 0.5


def test_the_peer_fails_in_half_precision():
    options = {"levels": [6, 6, 6], "orthogonal_rotation": True, "dim": 4}
    peer, layer = (layer.bfloat16() for layer in twins(upstream.FSQ, FSQ, options))
    x = torch.randn(2, 9, 4, dtype=torch.bfloat16)
    quantized, indices = layer(x)
    assert quantized.dtype == torch.bfloat16
    torch.testing.assert_close(layer.indices_to_codes(indices), quantized, rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError):
        peer(x)
    with pytest.raises(RuntimeError):
        peer.indices_to_codes(indices)


def test_the_peer_rotates_in_half_precision_under_autocast():
    peer, layer = (one.eval() for one in twins(upstream.FSQ, FSQ, {"levels": [6, 6, 6], "orthogonal_rotation": True}))
    x = torch.randn(2, 9, 3)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = layer(x), peer(x)[0]
    assert torch.equal(found[0], exact[0])
    assert torch.equal(found[1], exact[1])
    assert rounded.dtype == torch.bfloat16


def test_the_peer_cannot_rotate_what_it_rounded_to_float32():
    options = {"levels": [6, 6, 6], "orthogonal_rotation": True, "allowed_dtypes": (torch.float32,)}
    peer, layer = twins(upstream.FSQ, FSQ, options)
    x = torch.randn(2, 9, 3)
    exact = layer(x)
    peer, layer = peer.double(), layer.double()
    quantized, indices = layer(x.double())
    assert quantized.dtype == torch.float64
    assert torch.equal(indices, exact[1])
    torch.testing.assert_close(quantized.float(), exact[0])
    with pytest.raises(RuntimeError):
        peer(x.double())
