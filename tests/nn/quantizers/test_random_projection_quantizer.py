"""RandomProjectionQuantizer: a fixed function of its input."""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import RandomProjectionQuantizer
from nn.quantizers.upstream_parity import upstream

DIM, SIZE, CODE = 12, 16, 5


def quantizer(heads=3, **options):
    torch.manual_seed(4)
    return RandomProjectionQuantizer(dim=DIM, codebook_size=SIZE, codebook_dim=CODE, num_codebooks=heads, **options)


def cosines(layer, x):
    """By definition: (B, N, H, K) float64."""
    x = x.double()
    if isinstance(layer.norm, torch.nn.LayerNorm):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + layer.norm.eps).sqrt()
    projected = torch.einsum("bnd,hde->bnhe", x, layer.rand_projs.double())
    codes = layer.vq._codebook.embed.double()
    return torch.cosine_similarity(projected[..., None, :], codes, dim=-1)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_indices_are_the_codes_at_the_smallest_angle(heads, norm):
    layer = quantizer(heads, norm=norm)
    x = torch.randn(2, 30, DIM) + 3
    indices = layer(x)
    assert indices.shape == ((2, 30, heads) if heads > 1 else (2, 30))
    assert torch.equal(indices.view(2, 30, heads), cosines(layer, x).argmax(-1))
    if norm:
        assert torch.equal(layer(x * 5 + 7), indices)


@pytest.mark.parametrize("heads", [1, 3])
def test_given_indices_are_scored_by_their_cross_entropy(heads):
    layer = quantizer(heads)
    x = torch.randn(2, 30, DIM)
    indices = torch.randint(-1, SIZE, layer(x).shape)
    logits = cosines(layer, x).flatten(0, -2)
    expected = torch.nn.functional.cross_entropy(logits, indices.flatten(), ignore_index=-1)
    torch.testing.assert_close(layer(x, indices=indices).double(), expected, rtol=1e-5, atol=0)


def test_nothing_is_trained():
    layer = quantizer().train()
    assert not list(layer.parameters())
    assert not layer.vq.training
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(2, 30, DIM))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    other = quantizer(norm=False)
    other.load_state_dict(layer.state_dict(), strict=True)


def test_codes_have_the_dimension_asked_for_and_no_projection_of_their_own():
    """Upstream's have dimension codebook_dim x num_codebooks, behind a trainable random projection."""
    theirs = upstream.RandomProjectionQuantizer(dim=DIM, codebook_size=SIZE, codebook_dim=CODE, num_codebooks=3)
    ours = quantizer()
    assert ours.vq._codebook.embed.shape == (3, SIZE, CODE)
    assert theirs.vq._codebook.embed.shape == (3, SIZE, 3 * CODE)
    assert any(parameter.requires_grad for parameter in theirs.parameters())


def test_half_precision_and_bad_input():
    layer = quantizer().bfloat16()
    assert layer(torch.randn(2, 3, DIM, dtype=torch.bfloat16)).shape == (2, 3, 3)
    with pytest.raises(ValueError, match=r"RandomProjectionQuantizer: x is \(2, 3, 5\), expected \(B, N, 12\)"):
        layer(torch.randn(2, 3, 5))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        layer(torch.zeros(2, 3, DIM, dtype=torch.int64))
    with pytest.raises(ValueError, match="codebook_dim is 0"):
        RandomProjectionQuantizer(dim=4, codebook_size=4, codebook_dim=0)
