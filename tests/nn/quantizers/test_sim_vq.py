"""`SimVQ` against its definition in float64, and as a layer: precision, compilation, complaints."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from ferrovae.nn import SimVQ


@pytest.mark.parametrize("rows", [7, 50])
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_its_gradients(rows, training):
    """The first term trains the map alone, the second the input alone."""
    layer = SimVQ(6, 20, frozen_codebook_dim=4, commitment_weight=2.0, rotation_trick=False).train(training)
    x = torch.randn(1, rows, 6, requires_grad=True)
    quantized, indices, loss = layer(x)
    loss.backward()
    rows64 = x[0].detach().double().requires_grad_()
    weight = layer.code_transform.weight.detach().double().requires_grad_()
    codes = layer.frozen_codebook.double() @ weight.T
    nearest = torch.cdist(rows64, codes).argmin(-1)
    assert torch.equal(indices[0], nearest)
    chosen = codes[nearest]
    truth = 2 * ((rows64.detach() - chosen).square().mean() + 0.25 * (rows64 - chosen.detach()).square().mean())
    truth.backward()
    torch.testing.assert_close(quantized[0].double(), chosen.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad[0].double(), rows64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.code_transform.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_a_map_that_looks_at_all_codes_sees_all_of_them():
    """Whitening over the codebook would not be the same over the rows that were chosen."""
    layer = SimVQ(6, 20, codebook_transform=nn.BatchNorm1d(6, affine=False))
    quantized, indices, _ = layer(torch.randn(1, 3, 6))
    statistics = nn.functional.batch_norm(layer.frozen_codebook, None, None, training=True)
    torch.testing.assert_close(quantized[0], statistics[indices[0]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.indices_to_codes(indices), quantized, rtol=1e-4, atol=1e-5)
    assert layer.indices_to_codes(indices[None]).shape == (1, *quantized.shape)


@pytest.mark.parametrize("channel_first", [True, False])
def test_decoding(channel_first):
    layer = SimVQ(6, 20, channel_first=channel_first)
    for shape in ((5, 6), (2, 6, 6), (2, 6, 4, 6)):
        quantized, indices, _ = layer(torch.randn(shape))
        assert indices.shape == (*shape[:1], *(shape[2:] if channel_first else shape[1:-1]))
        torch.testing.assert_close(layer.indices_to_codes(indices), quantized, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision(dtype):
    layer = SimVQ(6, 20).to(dtype)
    x = torch.randn(2, 30, 6).to(dtype).requires_grad_()
    quantized, indices, loss = layer(x)
    (quantized.sum() + loss).backward()
    assert (quantized.dtype, loss.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    codebook = layer.codebook
    assert torch.equal(indices, torch.cdist(x.double(), codebook.double()).argmin(-1))
    assert x.grad.dtype == layer.code_transform.weight.grad.dtype == dtype


def test_autocast_changes_no_index():
    layer = SimVQ(16, 200)
    x = torch.randn(4, 200, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
    torch.testing.assert_close(cast, layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        quantized, *_ = layer(x.bfloat16())
    assert quantized.dtype == torch.bfloat16


def test_no_vectors_and_one_that_is_not_finite():
    layer = SimVQ(4, 8)
    assert layer(torch.zeros(0, 3, 4))[2] == 0
    _, indices, loss = layer(torch.tensor([[torch.nan, 0, 0, 0], [1, 2, 3, 4.0]]))
    assert indices[0] == 0
    assert loss.isnan()


@pytest.mark.parametrize("rows", [5, 40])
def test_compiled_whole_and_exported(rows):
    torch.compiler.reset()
    layer = SimVQ(6, 20)
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, rows, 6)
    for train in (True, False):
        layer.train(train)
        results = []
        for run in (layer, whole):
            layer.zero_grad()
            inputs = x.clone().requires_grad_()
            quantized, indices, loss = run(inputs)
            (quantized.square().sum() + loss).backward()
            results.append((quantized, indices, loss, inputs.grad, layer.code_transform.weight.grad.clone()))
        torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_complaints():
    with pytest.raises(ValueError, match="SimVQ: codebook_size is 0, expected at least 1"):
        SimVQ(4, 0)
    with pytest.raises(ValueError, match=re.escape("SimVQ: init_fn gave (4, 8), expected (8, D)")):
        SimVQ(4, 8, init_fn=torch.t)
    with pytest.raises(ValueError, match=re.escape("SimVQ: codebook_transform gives (8, 5), expected (8, 4)")):
        SimVQ(4, 8, codebook_transform=nn.Linear(4, 5))(torch.randn(2, 9, 4))
    layer = SimVQ(4, 8)
    with pytest.raises(ValueError, match=re.escape("SimVQ: x is (2, 9, 3), expected (B, ..., 4)")):
        layer(torch.randn(2, 9, 3))
    with pytest.raises(TypeError, match=r"SimVQ: x is torch.int64"):
        layer(torch.ones(2, 9, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="SimVQ: indices run from 0 to 8, expected 0 to 7"):
        layer.indices_to_codes(torch.arange(9)[None])
