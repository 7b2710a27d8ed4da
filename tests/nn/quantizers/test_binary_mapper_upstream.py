"""BinaryMapper beside vector-quantize-pytorch's, where it is installed (`pip install 'ferrovae[bench]'`).

Where the right value differs from the peer's: infinite logits, which are certain bits, make its entropy and its
straight-through gradients NaN; a NaN in the logits, and half-precision logits in training, make it raise.
"""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import BinaryMapper
from nn.quantizers.scalar_upstream import assert_parity, assert_same, twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

CASES = [
    {},
    {"bits": 4},
    {"bits": 4, "kl_loss_threshold": 0.1},
    {"bits": 3, "deterministic_on_eval": True},
    {"bits": 5, "kl_loss_threshold": 0.0, "deterministic_on_eval": True},
]
CALLS = [
    {},
    {"temperature": 0.3},
    {"straight_through": False, "return_indices": True},
    {"straight_through": True, "calc_aux_loss": False},
    {"calc_aux_loss": True, "reduce_aux_kl_loss": False, "return_indices": True},
    {"deterministic": True, "return_indices": True},
    {"deterministic": False, "reduce_aux_kl_loss": False},
]


@pytest.mark.parametrize("arguments", CALLS)
@pytest.mark.parametrize("options", CASES)
def test_results_and_gradients(options, arguments):
    peer, layer = twins(upstream.BinaryMapper, BinaryMapper, options)
    for shape in ((layer.bits,), (7, layer.bits), (2, 3, 4, layer.bits)):
        assert_parity(peer, layer, 2 * torch.randn(shape), **arguments)


@pytest.mark.parametrize("options", CASES)
def test_methods_and_attributes(options):
    peer, layer = twins(upstream.BinaryMapper, BinaryMapper, options)
    names = ["bits", "num_codes", "codes", "power_two", "kl_loss_threshold", "deterministic_on_eval", "zero"]
    for name in names:
        assert_same(getattr(layer, name), getattr(peer, name))
    logits = torch.randn(2, 5, layer.bits)
    one_hot, indices, _ = layer(logits, return_indices=True)
    assert_same(layer.binary_entropy(logits), peer.binary_entropy(logits))
    for reduce in (True, False):
        assert_same(layer.calc_aux_loss(logits, reduce), peer.calc_aux_loss(logits, reduce))
    for given in ({"indices": indices}, {"one_hot": one_hot}, {"indices": indices, "sum_bits": False}):
        assert_same(layer.log_prob(logits, **given), peer.log_prob(logits, **given))


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
