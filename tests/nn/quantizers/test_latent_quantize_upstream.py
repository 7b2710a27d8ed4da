"""LatentQuantize beside vector-quantize-pytorch's, where it is installed (`pip install 'ferrovae[bench]'`).

Where the right value differs from the peer's:
- the values: the peer makes them parameters, but no loss reaches them;
- indices and decoding once the values have moved: the peer goes on with the evenly spread ones, and truncates;
- `in_place_codebook_optimizer`: the peer raises in training;
- a weight of None, which the peer's signature allows: the peer raises;
- values that are not optimised: the peer leaves them behind when the layer moves to another device or dtype.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae.nn import LatentQuantize
from nn.quantizers.scalar_upstream import assert_parity, assert_same, twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

CASES = [
    {"levels": [5, 5, 8], "dim": 3},
    {"levels": [5, 5, 8], "dim": 9},
    {"levels": 6, "dim": 9, "codebook_dim": 4},
    {"levels": 4, "dim": 6, "codebook_dim": 3, "num_codebooks": 2},
    {"levels": [5, 4], "dim": 7, "num_codebooks": 3, "keep_num_codebooks_dim": True},
    {"levels": [5, 4], "dim": 7, "keep_num_codebooks_dim": True},
    {"levels": [5, 4], "dim": 7, "keep_num_codebooks_dim": False, "num_codebooks": 2},
    {"levels": [5, 4], "dim": 7, "commitment_loss_weight": 0.0},
    {"levels": [5, 4], "dim": 2, "quantization_loss_weight": 0.0, "commitment_loss_weight": 0.7},
    {"levels": [5, 4], "dim": 7, "optimize_values": False},
    {"levels": [5, 4], "dim": 2, "optimize_values": False, "num_codebooks": 1, "codebook_dim": 2},
]


@pytest.mark.parametrize("options", CASES)
def test_results_gradients_state_and_decoding(options):
    peer, layer = twins(upstream.LatentQuantize, LatentQuantize, options)
    values = [name for name, _ in layer.named_parameters() if name.startswith("values")]
    for shape in ((5, layer.dim), (3, layer.dim, 11), (2, layer.dim, 3, 4), (2, layer.dim, 2, 3, 2)):
        # rows between the values: rounding decides no index
        _, indices, _ = assert_parity(peer, layer, 0.4 * torch.randn(shape), skip_gradients=values)
        assert_same(layer.indices_to_codes(indices), peer.indices_to_codes(indices))
        assert_same(layer.indices_to_codes(indices, False), peer.indices_to_codes(indices, project_out=False))


@pytest.mark.parametrize("options", CASES)
def test_methods_and_attributes(options):
    peer, layer = twins(upstream.LatentQuantize, LatentQuantize, options)
    names = ["_levels", "codebook_dim", "effective_codebook_dim", "num_codebooks", "keep_num_codebooks_dim", "dim"]
    names += ["has_projections", "codebook_size", "implicit_codebook", "commitment_loss_weight"]
    for name in [*names, "quantization_loss_weight"]:
        assert_same(getattr(layer, name), getattr(peer, name))
    for ours, theirs in zip(layer.values_per_latent, peer.values_per_latent, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(layer.values_per_latent) == len(peer.values_per_latent)
    torch.testing.assert_close(layer.values_per_latent[-1], peer.values_per_latent[-1])
    z = 0.4 * torch.randn(2, 12, layer.num_codebooks, layer.codebook_dim)
    codes = layer.quantize(z)
    assert_same(codes, peer.quantize(z))
    assert_same(layer.codes_to_indices(codes), peer.codes_to_indices(codes))
    for reduce in ("mean", "none", "sum"):
        assert_same(layer.quantization_loss(z, codes, reduce), peer.quantization_loss(z, codes, reduce))
        assert_same(layer.commitment_loss(z, codes, reduce), peer.commitment_loss(z, codes, reduce))
    grid = [torch.Size([3, 4])]
    assert_same(layer.quantize_and_project(z, True, grid), peer.quantize_and_project(z, True, grid))


def test_the_peer_trains_no_values():
    peer, layer = twins(upstream.LatentQuantize, LatentQuantize, {"levels": [5, 4], "dim": 2})
    for one in (peer, layer):
        x = torch.randn(3, 2, 9, requires_grad=True)
        one(x)[2].backward()
    assert all(values.grad is None for values in peer.values_per_latent)
    assert all(values.grad is not None for values in layer.values_per_latent)


def test_the_peer_cannot_read_values_that_moved():
    peer, layer = twins(upstream.LatentQuantize, LatentQuantize, {"levels": [5, 7], "dim": 2})
    for one in (peer, layer):
        one.eval()
        with torch.no_grad():
            for values in one.values_per_latent:
                values.mul_(1.7).add_(0.03)
    z = torch.randn(4, 2, 50)
    quantized, indices, _ = layer(z)
    theirs, their_indices, _ = peer(z)
    torch.testing.assert_close(quantized, theirs)
    digits = torch.stack(
        [(z[:, i, :, None] - values).abs().argmin(-1) for i, values in enumerate(layer.values_per_latent)], -1
    )
    assert torch.equal(indices, (digits * torch.tensor([1, 5])).sum(-1).int())
    torch.testing.assert_close(layer.indices_to_codes(indices), quantized)
    assert (their_indices != indices).float().mean() > 0.5
    assert (peer.indices_to_codes(their_indices) - theirs).abs().max() > 0.1


def test_the_peer_cannot_optimize_in_place():
    options = {"levels": [5, 4], "dim": 2, "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=1.0)}
    peer, layer = twins(upstream.LatentQuantize, LatentQuantize, options)
    layer(torch.randn(3, 2, 9))
    with pytest.raises(AttributeError):
        peer(torch.randn(3, 2, 9))


def test_the_peer_refuses_no_weight():
    layer = LatentQuantize([5, 4], 2, commitment_loss_weight=None, quantization_loss_weight=None)
    assert layer(torch.randn(3, 2, 9))[2] == 0
    with pytest.raises((TypeError, RuntimeError)):
        upstream.LatentQuantize([5, 4], 2, commitment_loss_weight=None)


def test_the_peer_leaves_constants_behind():
    options = {"levels": [3], "dim": 1, "optimize_values": False}
    peer, layer = (one.double() for one in twins(upstream.LatentQuantize, LatentQuantize, options))
    assert layer.values_per_latent[0].dtype == torch.float64
    assert peer.values_per_latent[0].dtype == torch.float32
