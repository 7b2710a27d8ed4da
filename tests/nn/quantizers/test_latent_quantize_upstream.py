"""Where `LatentQuantize` differs from vector-quantize-pytorch's; `test_latent_quantize_pairwise` has what is equal.

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
from nn.quantizers.scalar_upstream import twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)


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
