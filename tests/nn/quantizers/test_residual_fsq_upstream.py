"""Residual FSQ beside vector-quantize-pytorch's, where it is installed (`pip install 'ferrovae[bench]'`).

Where the right value differs from the peer's:
- `orthogonal_rotation`: the peer decodes indices without rotating back;
- channel-first layers: the peer cannot decode the indices it gives, nor return all codes;
- `.bfloat16()` layers: the peer rounds the scales L^-q, and with them what it decodes to;
- images in `GroupedResidualFSQ`: the peer raises;
- the dtype of indices where stages may be dropped: the peer's is int32 in the steps whose draw drops none;
- half-precision input to a float32 layer without projection: the peer widens the output.
"""

from __future__ import annotations

import random

import pytest
import torch

from ferrovae.nn import GroupedResidualFSQ, ResidualFSQ
from ferrovae.nn.quantizers import quantizer_dropout
from nn.quantizers.scalar_upstream import assert_parity, assert_same, twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

LEVELS = [8, 5, 5, 3]
CASES = [
    {},
    {"dim": 10},
    {"num_quantizers": 1, "dim": 10, "quantize_dropout": True},
    {"levels": [2, 2, 2], "num_quantizers": 6, "dim": 5},
    {"bound_hard_clamp": False},
    {"bound_hard_clamp": False, "soft_clamp_input_value": 1.5, "dim": 6},
    {"bound_hard_clamp": False, "soft_clamp_input_value": [1.5, 2.0, 1.0, 3.0]},
    {"bound_hard_clamp": False, "soft_clamp_input_value": torch.tensor([1.5, 2.0, 1.0, 3.0]), "dim": 6},
    {"noise_dropout": 0.5},
    {"keep_num_codebooks_dim": True, "dim": 6},
    {"force_quantization_f32": False, "allowed_dtypes": (torch.float64,), "dim": 3},
    {"is_channel_first": True},
    {"is_channel_first": True, "dim": 6, "bound_hard_clamp": False},
    {"quantize_dropout": True},
    {"quantize_dropout": True, "quantize_dropout_cutoff_index": 2, "dim": 6},
    {"quantize_dropout": True, "quantize_dropout_multiple_of": 3, "num_quantizers": 7},
    {"quantize_dropout": True, "quantize_dropout_multiple_of": 2, "is_channel_first": True},
]


def pair(options):
    options = {"levels": LEVELS, "num_quantizers": 4} | options
    return twins(upstream.ResidualFSQ, ResidualFSQ, options)


def peers_draw(low, high, *, seed, batch, device):
    assert batch is None
    return torch.tensor(random.Random(int(seed)).randrange(low, high))


@pytest.fixture(autouse=True)
def _same_draws(monkeypatch):
    monkeypatch.setattr(quantizer_dropout, "draw_last_stage", peers_draw)


def seeds_that_drop(layer):
    low, high = layer.quantize_dropout_cutoff_index, layer.num_quantizers
    last = {seed: random.Random(seed).randrange(low, high) + 1 for seed in range(20)}
    multiple = layer.quantize_dropout_multiple_of
    return [seed for seed, kept in last.items() if -(-kept // multiple) * multiple < high][:4]


@pytest.mark.parametrize("options", CASES)
def test_results_gradients_state_and_decoding(options):
    peer, layer = pair(options)
    dim = options.get("dim", len(options.get("levels", LEVELS)))
    first = layer.is_channel_first
    seeds = seeds_that_drop(layer) if layer.quantize_dropout else [None]
    assert seeds
    for shape in ((3, dim, 11), (2, dim, 3, 5)) if first else ((3, 11, dim),):
        x = torch.randn(shape)
        for seed in seeds:
            arguments = {} if first else {"return_all_codes": True}
            _, indices, *_ = assert_parity(peer, layer, x, rand_quantize_dropout_fixed_seed=seed, **arguments)
        if first:
            indices = indices.movedim(1, -1)
        for given in (indices, indices[..., :2]) if layer.quantize_dropout else (indices,):
            given = given.long()
            given[0, 0] = -1
            assert_same(layer.get_codes_from_indices(given), peer.get_codes_from_indices(given))
            assert_same(layer.get_output_from_indices(given), peer.get_output_from_indices(given))


@pytest.mark.parametrize("options", CASES)
def test_attributes(options):
    peer, layer = pair(options)
    names = ["codebooks", "codebook_size", "scales", "soft_clamp_input_value", "levels", "num_quantizers"]
    names += ["has_projections", "is_channel_first", "quantize_dropout", "quantize_dropout_cutoff_index"]
    for name in [*names, "quantize_dropout_multiple_of"]:
        assert_same(getattr(layer, name), getattr(peer, name))


@pytest.mark.parametrize("options", [{"dim": 10}, {"dim": 10, "quantize_dropout": True}])
def test_autocast(options):
    peer, layer = pair(options)
    x = torch.randn(3, 11, 10)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert_same(layer(x), peer(x))


GROUPED = [
    {},
    {"groups": 2},
    {"groups": 3, "bound_hard_clamp": False},
    {"groups": 2, "quantize_dropout": True},
    {"groups": 2, "quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 2},
    {"groups": 2, "noise_dropout": 0.5},
    {"groups": 2, "accept_image_fmap": True, "is_channel_first": True},
]


@pytest.mark.parametrize("options", GROUPED)
def test_grouped(options, monkeypatch):
    options = {"dim": 12, "levels": LEVELS, "num_quantizers": 4} | options
    peer, layer = twins(upstream.GroupedResidualFSQ, GroupedResidualFSQ, options)
    image = layer.accept_image_fmap
    x = torch.randn((2, 12, 3, 5) if image else (2, 7, 12))
    arguments = {} if image else {"return_all_codes": True}
    for seed in seeds_that_drop(layer.rvqs[0]) if layer.rvqs[0].quantize_dropout else [0]:
        monkeypatch.setattr(upstream.residual_fsq, "get_maybe_sync_seed", lambda _, seed=seed: seed)
        monkeypatch.setattr(layer, "dropout_seed", lambda _, seed=seed: seed)
        _, indices, *_ = assert_parity(peer, layer, x, **arguments)
    assert_same(layer.codebooks, peer.codebooks)
    assert layer.codebook_size == peer.codebook_size
    assert layer.split_dim == peer.split_dim
    if not image:
        assert_same(layer.get_codes_from_indices(indices), peer.get_codes_from_indices(indices))
        assert_same(layer.get_output_from_indices(indices), peer.get_output_from_indices(indices))


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
