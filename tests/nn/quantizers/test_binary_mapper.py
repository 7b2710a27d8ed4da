"""BinaryMapper: the distribution it draws from, the gradient it passes, and its entropy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ferrovae.nn import BinaryMapper


def table(logits):
    """P(code k), (..., 2^d), multiplied out in float64."""
    ones = logits.double().sigmoid()
    bits = logits.shape[-1]
    columns = []
    for word in itertools.product((0, 1), repeat=bits):
        bit = torch.tensor(word[::-1])
        columns.append(torch.where(bit == 1, ones, 1 - ones).prod(-1))
    return torch.stack(columns, -1)


def test_codes_are_drawn_with_their_probabilities():
    layer = BinaryMapper(3).eval()
    logits = torch.tensor([0.5, -1.0, 2.0])
    for temperature in (1.0, 0.5):
        _, indices, _ = layer(logits.expand(50_000, 3), temperature, return_indices=True)
        expected = table(logits / temperature) * 50_000
        statistic = ((torch.bincount(indices, minlength=8) - expected) ** 2 / expected).sum()
        assert statistic < 7 + 5 * 14**0.5


def test_the_likelier_bits():
    layer = BinaryMapper(3, deterministic_on_eval=True).eval()
    one_hot, indices, loss = layer(torch.tensor([[0.5, -1.0, 2.0], [-0.1, 0.1, -0.1]]), return_indices=True)
    assert indices.tolist() == [5, 2]
    assert torch.equal(one_hot, torch.eye(8)[[5, 2]])
    assert loss == 0


def test_the_value_is_one_hot_and_the_gradient_that_of_the_probabilities():
    layer = BinaryMapper(4)
    logits = torch.randn(2, 5, 4, requires_grad=True)
    one_hot, indices, _ = layer(logits, return_indices=True)
    assert torch.equal(one_hot, torch.eye(16)[indices])
    cotangent = torch.randn_like(one_hot)
    (gradient,) = torch.autograd.grad(one_hot, logits, cotangent)
    twin = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(table(twin), twin, cotangent.double())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_entropy_log_probability_and_loss():
    layer = BinaryMapper(4, kl_loss_threshold=0.5)
    logits = 2 * torch.randn(30, 4, requires_grad=True)
    probs = table(logits.detach())
    entropy = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(layer.binary_entropy(logits).double(), entropy, rtol=1e-5, atol=1e-6)
    loss = layer.calc_aux_loss(logits, reduce_aux_kl_loss=False)
    torch.testing.assert_close(loss.double(), (4 * math.log(2) - entropy - 0.5).clamp(min=0), rtol=1e-4, atol=1e-5)
    indices = torch.arange(16).repeat(2)[:30]
    found = layer.log_prob(logits, indices=indices)
    torch.testing.assert_close(found.double(), probs.log().gather(1, indices[:, None])[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.log_prob(logits, one_hot=torch.eye(16)[indices]), found)
    torch.testing.assert_close(layer.log_prob(logits, indices=indices, sum_bits=False).sum(-1), found)


def test_no_rows():
    one_hot, indices, loss = BinaryMapper(4)(torch.zeros(0, 4), return_indices=True)
    assert (one_hot.shape, indices.shape, float(loss)) == ((0, 16), (0,), 0.0)


def test_compiles_and_exports():
    layer = BinaryMapper(4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    logits = torch.randn(5, 4, requires_grad=True)
    results = []
    for run in (compiled, layer):
        torch.manual_seed(1)
        logits.grad = None
        one_hot, indices, loss = run(logits, return_indices=True)
        ((one_hot * torch.arange(16.0)).sum() + loss).backward()
        results.append((one_hot, indices, loss, logits.grad))
    torch.testing.assert_close(results[0], results[1])
    layer = BinaryMapper(4, deterministic_on_eval=True).eval()
    x = torch.randn(5, 4)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_bad_input():
    with pytest.raises(ValueError, match="bits is 0"):
        BinaryMapper(0)
    layer = BinaryMapper(3)
    with pytest.raises(ValueError, match=r"logits is \(2, 4\), expected \(..., 3\)"):
        layer(torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"logits is torch\.int64"):
        layer(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="either indices or one_hot"):
        layer.log_prob(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected 0 to 7"):
        layer.log_prob(torch.zeros(2, 3), indices=torch.tensor([1, 8]))
