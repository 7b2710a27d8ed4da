"""Where `FSP` differs from vector-quantize-pytorch's; `test_fsp_pairwise` has what is equal.

- bins under autocast: the peer's value of 1 falls into a bin that does not exist;
- indices from 2^24 codes on: the peer sums them in float32;
- moments of a channel that is constant: the peer's gradient is NaN; of a single row: its variance is;
- half precision: the peer rounds the bins; a `.bfloat16()` layer with projections raises when it perturbs or decodes.
"""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import FSP
from nn.quantizers.scalar_upstream import twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

LEVELS = [8, 5, 5, 4]


def test_the_peer_cannot_perturb_or_decode_in_half_precision():
    peer, layer = (one.bfloat16() for one in twins(upstream.FSP, FSP, {"levels": LEVELS, "dim": 7}))
    x = torch.randn(2, 9, 7).bfloat16()
    assert layer(x)[0].dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        peer(x)
    quantized, indices, _, _ = layer.eval()(x)
    assert quantized.dtype == torch.bfloat16
    torch.testing.assert_close(layer.indices_to_codes(indices), quantized, rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError):
        peer.indices_to_codes(indices)


def test_the_peer_rounds_bins_in_half_precision():
    peer, layer = (one.eval() for one in twins(upstream.FSP, FSP, {"levels": [200]}))
    x = torch.randn(2, 90, 1)
    bins = [one(x.bfloat16())[3]["level_indices"] for one in (layer, peer)]
    exact = layer(x.bfloat16().float())[3]["level_indices"]
    assert torch.equal(bins[0], exact)
    assert (bins[1].float() != exact).float().mean() > 0.2


def test_the_peers_bins_overflow_under_autocast():
    peer, layer = twins(upstream.FSP, FSP, {"levels": [4, 4], "dim": 3})
    x = 50 * torch.randn(2, 50, 3)
    with torch.autocast("cpu", torch.bfloat16):
        bins = [one(x)[3]["level_indices"] for one in (peer, layer)]
    assert bins[0].max() == 4
    assert bins[1].max() == 3


def test_the_peer_rounds_large_indices():
    peer, layer = twins(upstream.FSP, FSP, {"levels": [1000, 1000, 1000]})
    x = torch.randn(500, 3)
    bins = layer(x)[3]["level_indices"]
    right = (bins.long() * torch.tensor([1, 1000, 10**6])).sum(-1)
    assert torch.equal(layer.level_indices_to_indices(bins), right.int())
    assert (peer.level_indices_to_indices(bins) != right).float().mean() > 0.5


def test_the_peers_gradient_at_a_constant_channel():
    gradients = []
    for one in twins(upstream.FSP, FSP, {"levels": [4, 4], "vector_norm": "kurt"}):
        x = torch.cat([torch.randn(20, 1), torch.ones(20, 1)], dim=1).requires_grad_()
        one(x)[2].backward()
        gradients.append(x.grad)
    assert gradients[0].isnan().any()
    assert gradients[1].isfinite().all()


def test_the_peer_has_no_variance_of_one_row():
    peer, layer = twins(upstream.FSP, FSP, {"levels": [4, 4]})
    x = torch.tensor([[0.3, -0.4]])
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert peer(x)[2].isnan()
    # 0.1 of the mean squared mean, 0.07 of the squared distance of variance 0 to 0.8225
    assert float(layer(x)[2]) == pytest.approx(0.1 * (0.09 + 0.16) / 2 + 0.07 * 0.8225**2, rel=1e-5)
