"""FSP beside vector-quantize-pytorch's, where it is installed (`pip install 'ferrovae[bench]'`).

Where the right value differs from the peer's:
- bins under autocast: the peer's value of 1 falls into a bin that does not exist;
- indices from 2^24 codes on: the peer sums them in float32;
- moments of a channel that is constant: the peer's gradient is NaN; of a single row: its variance is;
- decoding with a `.bfloat16()` layer: the peer raises.
"""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import FSP
from ferrovae.nn.quantizers.vector_norm import VectorNorm
from nn.quantizers.scalar_upstream import assert_parity, assert_same, twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

LEVELS = [8, 5, 5, 4]
CASES = [
    {},
    {"levels": tuple(LEVELS), "dim": 7},
    {"dim": 7, "projection_has_bias": False, "act_name": "sigmoid", "vector_norm": "var_sigmoid"},
    {"act_name": "normal", "vector_norm": "var", "quantize_rate": 0.3},
    {"act_name": "laplace", "vector_norm": "var_laplace", "quantize_rate": 1.0, "need_inv_act": True},
    {"act_name": "cauchy", "vector_norm": "kurt", "channel_first": True},
    {"act_name": "cauchy", "vector_norm": "none", "need_inv_act": True, "dim": 3},
    {"act_name": "normal", "vector_norm": "kurt", "need_inv_act": True, "quantize_rate": 0.5, "channel_first": True},
    {"act_name": "tanh", "need_inv_act": True, "dim": 5, "channel_first": True, "quantize_rate": 0.5},
    {"act_name": "sigmoid", "need_inv_act": True, "quantize_rate": 0.5},
]


@pytest.mark.parametrize("options", CASES)
def test_results_gradients_state_and_decoding(options):
    peer, layer = twins(upstream.FSP, FSP, {"levels": LEVELS} | options)
    shapes = [(5, layer.dim), (3, layer.dim, 11), (2, layer.dim, 3, 4)]
    for shape in shapes:
        x = torch.randn(shape) if layer.channel_first else torch.randn(shape).movedim(1, -1).contiguous()
        for arguments in ({}, {"eps": 0.01}):
            _, indices, _, _ = assert_parity(peer, layer, x, **arguments)
        assert_same(layer.indices_to_codes(indices), peer.indices_to_codes(indices))
        assert_same(layer.indices_to_codes(indices, 0.2), peer.indices_to_codes(indices, eps=0.2))


@pytest.mark.parametrize("options", CASES)
def test_methods_and_attributes(options):
    peer, layer = twins(upstream.FSP, FSP, {"levels": LEVELS} | options)
    names = ["_levels", "_basis", "codebook_dim", "codebook_size", "dim", "channel_first", "has_projections"]
    for name in [*names, "act_name", "need_inv_act", "quantize_rate"]:
        assert_same(getattr(layer, name), getattr(peer, name))
    act = torch.rand(3, 20, 4)
    assert_same(layer.quantize_act_value(act, 0.1), peer.quantize_act_value(act, 0.1))
    bins = layer.quantize_act_value(act, 1e-6)[1]
    indices = layer.level_indices_to_indices(bins)
    assert_same(indices, peer.level_indices_to_indices(bins))
    assert_same(layer.indices_to_level_indices(indices), peer.indices_to_level_indices(indices))
    assert_same(layer.indices_to_act_value(indices), peer.indices_to_act_value(indices))
    z = torch.randn(50)
    assert_same(layer.act_func(z), peer.act_func(z))
    assert_same(layer.inv_act_func(act), peer.inv_act_func(act), rtol=1e-4)


@pytest.mark.parametrize("name", ["none", "var", "kurt", "var_tanh", "var_sigmoid", "var_laplace"])
def test_presets_of_the_penalty(name):
    ours, theirs = VectorNorm.build(name), upstream.finite_scalar_perturbation.VectorNorm.build(name)
    kept = ["l1_weight", "l2_weight", "l3_weight", "l4_weight", "eps"]
    for attribute in kept:
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    z = torch.randn(40, 3).exp()
    assert_same(ours(z), theirs(z), rtol=1e-4)


def test_half_precision():
    peer, layer = twins(upstream.FSP, FSP, {"levels": LEVELS, "dim": 7})
    x = torch.randn(2, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(x), peer(x)
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    assert (ours[1] == theirs[1]).float().mean() > 0.7
    peer, layer = peer.bfloat16().eval(), layer.bfloat16().eval()
    quantized, indices, _, _ = layer(x.bfloat16())
    assert quantized.dtype == torch.bfloat16
    torch.testing.assert_close(layer.indices_to_codes(indices), quantized, rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError):
        peer.indices_to_codes(indices)


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
