"""FSQ beside vector-quantize-pytorch's, where it is installed (`pip install 'ferrovae[bench]'`).

Where the right value differs from the peer's:
- `noise_dropout`: the peer adds noise to half of the elements whatever the probability;
- indices from 2^24 codes on: the peer sums them in float32;
- `.bfloat16()` layers that rotate or decode: the peer raises;
- a vector with a NaN: the peer's index is what the platform makes of a NaN as an integer.
"""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import FSQ
from nn.quantizers.scalar_upstream import assert_parity, assert_same, twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

LEVELS = [8, 5, 5, 4]
CASES = [
    {"levels": LEVELS},
    {"levels": tuple(LEVELS), "dim": 7},
    {"levels": LEVELS, "dim": 7, "projection_has_bias": False, "scale": 2.0},
    {"levels": LEVELS, "num_codebooks": 2},
    {"levels": LEVELS, "num_codebooks": 3, "dim": 10, "keep_num_codebooks_dim": True},
    {"levels": LEVELS, "keep_num_codebooks_dim": True},
    {"levels": LEVELS, "channel_first": True},
    {"levels": LEVELS, "channel_first": True, "dim": 6, "num_codebooks": 2},
    {"levels": LEVELS, "return_indices": False},
    {"levels": LEVELS, "bound_hard_clamp": True},
    {"levels": LEVELS, "force_quantization_f32": False, "dim": 9},
    {"levels": LEVELS, "allowed_dtypes": (torch.float64,), "bound_hard_clamp": True, "dim": 9},
    {"levels": [2, 3, 4, 5], "preserve_symmetry": True},
    {"levels": [2, 3, 4, 5], "preserve_symmetry": True, "bound_hard_clamp": True, "dim": 6},
    {"levels": [2, 3, 4, 5], "preserve_symmetry": True, "noise_dropout": 0.5, "num_codebooks": 2},
    {"levels": [6, 6, 6, 6], "orthogonal_rotation": True},
    {"levels": [6, 6, 6, 6], "orthogonal_rotation": True, "num_codebooks": 2, "dim": 5},
    {"levels": [5, 5, 5], "orthogonal_rotation": True, "preserve_symmetry": True, "noise_dropout": 0.5},
    {"levels": [5, 5, 5], "orthogonal_rotation": True, "bound_hard_clamp": True, "channel_first": True},
]


def shapes(layer, options):
    if options.get("channel_first"):
        return [(3, layer.dim), (3, layer.dim, 11), (2, layer.dim, 3, 4), (2, layer.dim, 2, 3, 2)]
    return [(3, 11, layer.dim), (2, layer.dim, 3, 4), (2, layer.dim, 2, 3, 2)]


@pytest.mark.parametrize("options", CASES)
def test_results_gradients_state_and_decoding(options):
    peer, layer = twins(upstream.FSQ, FSQ, options)
    # noise is laid out in memory order, which only sequences share
    layouts = shapes(layer, options)[:1] if "noise_dropout" in options else shapes(layer, options)
    for shape in layouts:
        x = 1.5 * torch.randn(shape)
        _, indices = assert_parity(peer, layer, x)
        if indices is not None:
            assert_same(layer.indices_to_codes(indices), peer.indices_to_codes(indices))


@pytest.mark.parametrize("options", CASES)
def test_methods_and_attributes(options):
    peer, layer = twins(upstream.FSQ, FSQ, options)
    names = ["_levels", "_basis", "codebook_dim", "effective_codebook_dim", "num_codebooks", "keep_num_codebooks_dim"]
    names += ["dim", "channel_first", "has_projections", "return_indices", "allowed_dtypes", "scale", "noise_dropout"]
    names += ["force_quantization_f32", "bound_hard_clamp", "orthogonal_rotation", "preserve_symmetry"]
    if peer.return_indices:
        names += ["codebook_size", "implicit_codebook"]
    for name in names:
        assert_same(getattr(layer, name), getattr(peer, name))
    z = torch.randn(30, layer.codebook_dim)
    assert_same(layer.bound(z, 1e-2, True), peer.bound(z, 1e-2, True))
    assert_same(layer.symmetry_preserving_bound(z), peer.symmetry_preserving_bound(z))
    codes = layer.quantize(z)
    assert_same(codes, peer.quantize(z))
    indices = layer.codes_to_indices(codes)
    assert_same(indices, peer.codes_to_indices(codes))
    assert_same(layer.indices_to_level_indices(indices), peer.indices_to_level_indices(indices))
    assert_same(layer.indices_to_level_indices(indices.long()), peer.indices_to_level_indices(indices.long()))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("options", [CASES[0], CASES[1], CASES[13]])
def test_half_precision(options, autocast):
    peer, layer = twins(upstream.FSQ, FSQ, options)
    x = torch.randn(3, 11, layer.dim)
    if not autocast:
        x, peer, layer = x.bfloat16(), peer.bfloat16(), layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_same(layer(x), peer(x))


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
