"""Where `BinaryMapper` differs from vector-quantize-pytorch's (`pip install 'ferrovae[bench]'`).

What they have in common: test_binary_mapper_pairwise.py. The peer's entropy and straight-through gradients are NaN for
infinite logits, which are certain bits; a NaN in the logits, and half-precision logits in training, make it raise.
"""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import BinaryMapper
from nn.quantizers.scalar_upstream import assert_same, twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)


def test_the_peer_and_half_precision():
    peer, layer = twins(upstream.BinaryMapper, BinaryMapper, {"bits": 4})
    logits = torch.randn(2, 5, 4).bfloat16()
    torch.manual_seed(1)
    ours = layer(logits)
    torch.manual_seed(1)
    assert_same(ours, layer(logits.float()))
    with pytest.raises(RuntimeError):
        peer(logits)


def test_the_peer_and_infinite_logits():
    logits = torch.tensor([[torch.inf, -torch.inf, 0.0]])
    peer, layer = twins(upstream.BinaryMapper, BinaryMapper, {"bits": 3})
    assert float(layer.binary_entropy(logits)) == pytest.approx(0.6931472, rel=1e-6)
    assert peer.binary_entropy(logits).isnan().all()
    one_hot, loss = layer(logits)
    assert one_hot[0, [1, 5]].sum() == 1
    assert loss.isfinite()
    assert peer(logits)[0].isnan().any()


def test_the_peer_and_a_nan():
    logits = torch.tensor([[0.3, torch.nan], [5.0, 5.0]])
    peer, layer = twins(upstream.BinaryMapper, BinaryMapper, {"bits": 2})
    one_hot, indices, _ = layer.eval()(logits, return_indices=True)
    assert indices[0] < 2
    assert one_hot.sum(-1).tolist() == [1, 1]
    with pytest.raises(RuntimeError):
        peer(logits)
