"""`ResidualSimVQ` against the recursion in float64, and as a layer."""

from __future__ import annotations

import re

import pytest
import torch

from ferrovae.nn import ResidualSimVQ


def recursion(layer, x):
    """Indices (..., Q), codes (Q, ..., D) and squared distances (Q, ..., D) in float64: x (N, D)."""
    residual, indices, codes, distances = x.double(), [], [], []
    for codebook in layer.codebooks.double():
        indices.append(torch.cdist(residual, codebook).argmin(-1))
        codes.append(codebook[indices[-1]])
        distances.append((residual - codes[-1]).square())
        residual = residual - codes[-1]
    return torch.stack(indices, -1), torch.stack(codes), torch.stack(distances)


@pytest.mark.parametrize("training", [True, False])
def test_stages_quantize_what_is_left(training):
    layer = ResidualSimVQ(dim=6, num_quantizers=4, codebook_size=20, commitment_weight=2.0).train(training)
    x = torch.randn(2, 30, 6)
    quantized, indices, losses, all_codes = layer(x, return_all_codes=True)
    exact_indices, codes, distances = recursion(layer, x.view(-1, 6))
    assert torch.equal(indices.view(-1, 4), exact_indices)
    torch.testing.assert_close(
        all_codes.view(4, -1, 6).double(), codes.detach(), rtol=1e-5, atol=1e-5, check_device=False
    )
    torch.testing.assert_close(quantized.view(-1, 6).double(), codes.sum(0).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.double(), 2 * 1.25 * distances.mean((1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channel_first", [True, False])
def test_dropout_by_sample(channel_first):
    """Each sample keeps its own stages; the loss of a stage is about the samples that keep it."""
    layer = ResidualSimVQ(
        dim=6,
        num_quantizers=4,
        codebook_size=20,
        channel_first=channel_first,
        quantize_dropout=True,
        quantize_dropout_per_sample=True,
    )
    tokens = torch.randn(12, 3, 4, 6)
    x = tokens.movedim(-1, 1) if channel_first else tokens
    quantized, indices, losses = layer(x, rand_quantize_dropout_fixed_seed=5)
    kept = (indices >= 0).all(1).all(1).sum(-1)
    assert len(kept.unique()) > 1
    _, codes, distances = recursion(layer, tokens.view(-1, 6))
    keeps = torch.arange(4)[:, None] < kept
    total = (codes.view(4, 12, 3, 4, 6) * keeps[:, :, None, None, None]).sum(0)
    laid_out = quantized.movedim(1, -1) if channel_first else quantized
    torch.testing.assert_close(laid_out.double(), total, rtol=1e-4, atol=1e-5)
    for stage in range(4):
        counted = distances[stage].view(12, -1)[keeps[stage]]
        wanted = 1.25 * counted.mean() if keeps[stage].any() else torch.zeros(())
        torch.testing.assert_close(losses[stage].double(), wanted.double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision(dtype):
    layer = ResidualSimVQ(dim=6, num_quantizers=3, codebook_size=20).to(dtype)
    x = torch.randn(2, 9, 6).to(dtype).requires_grad_()
    quantized, indices, losses = layer(x)
    (quantized.sum() + losses.sum()).backward()
    assert (quantized.dtype, x.grad.dtype) == (dtype, dtype)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("by_sample", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_whole(by_sample):
    torch.compiler.reset()
    layer = ResidualSimVQ(
        dim=6, num_quantizers=3, codebook_size=20, quantize_dropout=True, quantize_dropout_per_sample=by_sample
    )
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 9, 6)
    for train in (True, False):
        layer.train(train)
        results = []
        for run in (layer, whole):
            torch.manual_seed(0)
            layer.zero_grad()
            inputs = x.clone().requires_grad_()
            quantized, indices, losses = run(inputs)
            (quantized.square().sum() + losses.sum()).backward()
            gradients = [parameter.grad.clone() for parameter in layer.parameters()]
            results.append((quantized, indices, losses, inputs.grad, gradients))
        torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_complaints():
    with pytest.raises(ValueError, match="ResidualSimVQ: heads is 2, expected 1"):
        ResidualSimVQ(dim=4, num_quantizers=2, codebook_size=8, heads=2)
    layer = ResidualSimVQ(dim=4, num_quantizers=2, codebook_size=8, channel_first=True)
    with pytest.raises(ValueError, match=re.escape("ResidualSimVQ: x is (2, 9, 4), expected (B, 4, ...)")):
        layer(torch.randn(2, 9, 4))
    with pytest.raises(ValueError, match="ResidualSimVQ: indices run from 0 to 8, expected -1 to 7"):
        layer.get_codes_from_indices(torch.tensor([[[0, 8]]]))
