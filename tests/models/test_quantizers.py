"""A VQ-VAE over every kind of quantizer: the same laws, whatever the layer's layout and results."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn as torch_nn

from ferrovae import nn
from ferrovae.models import VQVAE

DIM = 8
LAYERS = {
    "VectorQuantize": (lambda: nn.VectorQuantize(DIM, 16), 16, ()),
    "VectorQuantize, images": (lambda: nn.VectorQuantize(DIM, 16, accept_image_fmap=True), 16, ()),
    "ResidualVQ": (lambda: nn.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=16), 16, (3,)),
    "FSQ": (lambda: nn.FSQ([4, 3], dim=DIM), 12, ()),
    "ResidualFSQ": (lambda: nn.ResidualFSQ(levels=[4, 3], num_quantizers=2, dim=DIM), 12, (2,)),
    "LFQ": (lambda: nn.LFQ(dim=DIM, codebook_size=16), 16, ()),
    "LFQ, two codebooks": (lambda: nn.LFQ(dim=DIM, codebook_size=4, num_codebooks=2), 4, (2,)),
    "SimVQ": (lambda: nn.SimVQ(DIM, 16), 16, ()),
    "SimVQ, channels first": (lambda: nn.SimVQ(DIM, 16, channel_first=True), 16, ()),
}


def model_of(quantizer: torch_nn.Module) -> VQVAE:
    encoder = nn.ConvEncoder2d((1, 8, 8), DIM, downsample=4, width=8)
    decoder = nn.ConvDecoder2d(DIM, (1, 8, 8), channels=1, downsample=4, width=8)
    return VQVAE(encoder, decoder, quantizer, likelihood="bernoulli")


@pytest.mark.parametrize("name", LAYERS)
def test_codes_bound_and_gradients(name):
    build, size, stages = LAYERS[name]
    torch.manual_seed(0)
    model = model_of(build())
    x = (torch.rand(5, 1, 8, 8) > 0.5).float()
    objective = model.objective(x)
    objective.loss.backward()
    assert 1 <= objective.extra["perplexity"] <= size + 1e-3
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    model.eval()
    codes = model.encode(x)
    assert codes.shape == (5, 2, 2, *stages)
    assert codes.dtype == torch.int64
    assert model.code_shape == codes.shape[1:] == model.prior.event_shape
    assert codes.min() >= 0
    assert codes.max() < size
    elbo = model.elbo(x)
    places = math.prod(model.code_shape)
    torch.testing.assert_close(elbo.kl, torch.full((5,), places * math.log(size)))
    torch.testing.assert_close(elbo.reconstruction, model.likelihood(codes).log_prob(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.reconstruct(x), model.decode(codes))
    assert model.sample(3, seed=1).shape == (3, 1, 8, 8)


def test_the_peer_library_serves_as_well():
    upstream = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    torch.manual_seed(0)
    theirs = model_of(upstream.VectorQuantize(DIM, 16)).eval()
    ours = model_of(nn.VectorQuantize(DIM, 16)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = (torch.rand(5, 1, 8, 8) > 0.5).float()
    assert torch.equal(ours.encode(x), theirs.encode(x))
    torch.testing.assert_close(ours.elbo(x).elbo, theirs.elbo(x).elbo)


def test_a_quantizer_without_one_size_is_refused():
    with pytest.raises(ValueError, match="quantizer Identity has codebook_size None, expected one integer"):
        model_of(torch_nn.Identity())
