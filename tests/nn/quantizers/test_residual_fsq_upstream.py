"""Where the residual FSQ differs from vector-quantize-pytorch's; `test_residual_fsq_pairwise` has what is equal.

- `orthogonal_rotation`: the peer decodes indices without rotating back;
- channel-first layers: the peer cannot decode the indices it gives, nor return all codes;
- `.bfloat16()` layers: the peer rounds the scales L^-q, and with them what it decodes to;
- a number as soft clamp: the peer clamps half precision in half precision;
- images in `GroupedResidualFSQ`, and dropped stages where an axis of codebooks is kept: the peer raises;
- the dtype of indices where stages may be dropped: the peer's is int32 in the steps whose draw drops none;
- half-precision input to a float32 layer without projection: the peer widens the output.
"""

from __future__ import annotations

import random

import pytest
import torch

from ferrovae.nn import GroupedResidualFSQ, ResidualFSQ
from ferrovae.nn.quantizers import quantizer_dropout
from nn.quantizers.scalar_upstream import assert_same, twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

LEVELS = [8, 5, 5, 3]


def pair(options):
    options = {"levels": LEVELS, "num_quantizers": 4} | options
    return twins(upstream.ResidualFSQ, ResidualFSQ, options)


def peers_draw(low, high, *, seed, batch, device):
    assert batch is None
    return torch.tensor(random.Random(int(seed)).randrange(low, high))


@pytest.fixture(autouse=True)
def _same_draws(monkeypatch):
    monkeypatch.setattr(quantizer_dropout, "draw_last_stage", peers_draw)


@pytest.mark.parametrize(
    "option",
    [
        {"return_indices": False},
        {"num_codebooks": 2},
        {"preserve_symmetry": True},
        {"soft_clamp_input_value": 2.0},
        {"levels": [5, 1]},
        {"quantize_dropout_cutoff_index": -1},
    ],
)
def test_options_of_a_stage_that_both_refuse(option):
    for kind in (upstream.ResidualFSQ, ResidualFSQ):
        with pytest.raises((AssertionError, AttributeError, TypeError, ValueError)):
            kind(**({"levels": LEVELS, "num_quantizers": 4} | option))


def test_the_peer_decodes_without_the_rotation():
    peer, layer = (layer.eval() for layer in pair({"levels": [5, 5, 5], "orthogonal_rotation": True}))
    x = torch.rand(2, 9, 3) - 0.5
    quantized, indices, codes = layer(x, return_all_codes=True)
    assert_same((quantized, indices), peer(x))
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(codes.sum(0), quantized)
    assert (peer.get_output_from_indices(indices) - quantized).abs().max() > 0.1


def test_the_peer_cannot_decode_its_channel_first_indices():
    peer, layer = (layer.eval() for layer in pair({"is_channel_first": True, "dim": 6}))
    x = torch.randn(2, 6, 11)
    quantized, indices, codes = layer(x, return_all_codes=True)
    assert_same((quantized, indices), peer(x))
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(layer.get_codes_from_indices(indices), codes)
    with pytest.raises(Exception, match=r"."):
        peer.get_output_from_indices(indices)
    with pytest.raises(Exception, match=r"."):
        peer(x, return_all_codes=True)


def test_the_peer_rounds_its_scales_in_half_precision():
    options = {"levels": [5, 5, 5], "num_quantizers": 3}
    peer, layer = (layer.bfloat16() for layer in pair(options))
    scales = 5.0 ** -torch.arange(3)
    assert torch.equal(layer.scales[:, 0], scales.float())
    assert not torch.equal(peer.scales[:, 0].float(), scales.float())
    x = (torch.rand(2, 50, 3) - 0.5).bfloat16()
    quantized, indices = layer(x)
    assert quantized.dtype == torch.bfloat16
    # half a step of the last stage, and the rounding of the result
    clamp = layer.soft_clamp_input_value.float()
    target = (x.float() / clamp).tanh() * clamp
    assert ((layer.get_output_from_indices(indices).float() - target).abs() <= 0.26 * scales[-1] + 1e-6).all()


def test_the_peer_refuses_grouped_images():
    options = {"dim": 12, "groups": 2, "levels": LEVELS, "num_quantizers": 3, "accept_image_fmap": True}
    peer, layer = (layer.eval() for layer in twins(upstream.GroupedResidualFSQ, GroupedResidualFSQ, options))
    x = torch.randn(2, 12, 5, 7)
    quantized, indices, codes = layer(x, return_all_codes=True)
    options = options | {"accept_image_fmap": False}
    tokens = twins(upstream.GroupedResidualFSQ, GroupedResidualFSQ, options)[0].eval()
    wanted, wanted_indices = tokens(x.flatten(2).mT)
    torch.testing.assert_close(quantized.flatten(2).mT, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(indices.flatten(2, 3), wanted_indices)
    assert [code.shape for code in codes] == [(3, 2, 5, 7, 4)] * 2
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)
    with pytest.raises(RuntimeError):
        peer(x)


def test_the_peers_index_dtype_depends_on_the_draw():
    peer, layer = pair({"quantize_dropout": True})
    seeds = {random.Random(seed).randrange(0, 4): seed for seed in range(50)}
    x = torch.randn(2, 5, 4)
    kinds = [
        [one(x, rand_quantize_dropout_fixed_seed=seeds[last])[1].dtype for last in range(4)] for one in (layer, peer)
    ]
    assert kinds == [[torch.int64] * 4, [torch.int64] * 3 + [torch.int32]]


def test_the_peer_widens_half_precision_input():
    peer, layer = pair({})
    x = torch.randn(2, 5, 4).bfloat16()
    assert layer(x)[0].dtype == torch.bfloat16
    assert peer(x)[0].dtype == torch.float32
    torch.testing.assert_close(layer(x)[0], peer(x)[0].bfloat16())


def test_the_peer_clamps_in_half_precision():
    options = {"bound_hard_clamp": False, "soft_clamp_input_value": 1.5, "num_quantizers": 3}
    peer, layer = (one.eval() for one in pair(options))
    x = torch.randn(2, 50, 4).bfloat16()
    exact = layer(x.float())[1]
    assert torch.equal(layer(x)[1], exact)
    assert (peer(x)[1] != exact).any()


def test_the_peer_cannot_drop_stages_and_keep_an_axis():
    options = {"quantize_dropout": True, "keep_num_codebooks_dim": True}
    peer, layer = pair(options)
    x, seed = torch.randn(2, 9, 4), next(seed for seed in range(20) if random.Random(seed).randrange(0, 4) == 1)
    quantized, indices, codes = layer(x, return_all_codes=True, rand_quantize_dropout_fixed_seed=seed)
    wanted = pair(options | {"keep_num_codebooks_dim": False})[1](x, True, seed)
    assert indices.shape == (2, 9, 1, 4)
    assert (indices[..., 2:] == -1).all()
    assert torch.equal(indices[:, :, 0], wanted[1])
    assert torch.equal(quantized, wanted[0])
    assert torch.equal(codes[:, :, :, 0], wanted[2])
    with pytest.raises(RuntimeError):
        peer(x, rand_quantize_dropout_fixed_seed=seed)
