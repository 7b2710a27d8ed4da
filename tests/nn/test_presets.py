"""Encoder and decoder presets: every image size, plain-JSON constructors, scales that neither vanish nor blow up."""

from __future__ import annotations

import json

import pytest
import torch

from ferrovae import nn

SHAPES = [(1, 28, 28), (1, 8, 8), (1, 7, 7), (3, 33, 17), (2, 1, 1), (1, 1, 5)]
ACTIVATIONS = ["tanh", "relu", "leaky_relu", "gelu", "silu", "elu", "softplus"]


def pairs(shape, **options):
    return [
        (nn.MLPEncoder(shape, 5, **options), nn.MLPDecoder(5, shape, channels=2, **options), (10,)),
        (nn.ConvEncoder(shape, 5, width=4, **options), nn.ConvDecoder(5, shape, width=4, channels=2, **options), (10,)),
        (
            nn.ConvEncoder2d(shape, 5, width=4, **options),
            nn.ConvDecoder2d(5, shape, width=4, channels=2, **options),
            (5, -(-shape[1] // 4), -(-shape[2] // 4)),
        ),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_size_goes_in_and_comes_out(shape):
    for encoder, decoder, size in pairs(shape):
        for batch in (0, 1, 3):
            code = encoder(torch.rand(batch, *shape))
            assert code.shape == (batch, *size)
            assert decoder(torch.zeros(batch, *decoder.latent_shape)).shape == (batch, 2 * shape[0], *shape[1:])
        assert encoder.latent_shape == decoder.latent_shape
        assert encoder.data_shape == decoder.data_shape == shape
        if size != (10,):
            assert encoder.grid == decoder.grid == size[1:]


@pytest.mark.parametrize("downsample", [1, 2, 8])
def test_the_plane_shrinks_as_asked(downsample):
    encoder = nn.ConvEncoder2d((1, 33, 17), 3, downsample=downsample, width=4)
    assert encoder.grid == (-(-33 // downsample), -(-17 // downsample))
    decoder = nn.ConvDecoder2d(3, (1, 33, 17), downsample=downsample, width=4)
    assert decoder(encoder(torch.rand(2, 1, 33, 17))).shape == (2, 1, 33, 17)


def test_vectors_and_other_dtypes_are_taken():
    assert nn.MLPEncoder((9,), 2, hidden=())(torch.rand(4, 9)).shape == (4, 4)
    assert nn.MLPDecoder(2, (9,), channels=3)(torch.rand(4, 2)).shape == (4, 27)
    image = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    assert nn.ConvEncoder((1, 8, 8), 2)(image).dtype == torch.float32
    assert nn.ConvEncoder((1, 8, 8), 2).double()(image).dtype == torch.float64


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_by_name_and_arguments_from_json(activation):
    for encoder, decoder, _ in pairs([1, 6, 5], activation=activation):
        assert decoder(torch.ones(1, *decoder.latent_shape)).isfinite().all()
        assert encoder(torch.ones(1, 1, 6, 5)).isfinite().all()
    options = json.loads('{"data_shape": [1, 6, 5], "latent_dim": 3, "hidden": [8, 4], "activation": "relu"}')
    assert nn.MLPEncoder(**options)(torch.rand(2, 1, 6, 5)).shape == (2, 6)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_signals_keep_their_scale_through_deep_stacks(activation):
    shape = (1, 32, 32)
    x = torch.randn(16, *shape)
    stacks = [
        (nn.ConvEncoder(shape, 8, 16, 4, activation), nn.ConvDecoder(8, shape, 16, 4, activation)),
        (nn.ConvEncoder2d(shape, 8, 8, 32, activation), nn.ConvDecoder2d(8, shape, 8, 32, activation)),
    ]
    for encoder, decoder in stacks:
        z = torch.randn(16, *decoder.latent_shape)
        for output in (encoder(x), decoder(z)):
            assert 0.03 < output.std().item() < 4, (type(encoder).__name__, output.std())


def test_convolution_weights_are_glorot():
    layer = nn.ConvEncoder((1, 8, 8), 30, width=16, activation="tanh").body[1][0]
    bound = (6 / (16 * 9 + 32 * 9)) ** 0.5
    assert 0.98 * bound < layer.weight.abs().max() <= bound
    assert not layer.bias.any()


def test_mlp_weights_are_uniform_up_to_the_root_of_the_inputs():
    encoder = nn.MLPEncoder((100,), 30, (50,))
    for layer, inputs in ((encoder.body[0], 100), (encoder.head, 50)):
        assert 0.98 * inputs**-0.5 < layer.weight.abs().max() <= inputs**-0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.MLPEncoder((1, 8, 8), 0), r"MLPEncoder: latent_dim is \(0,\)"),
        (lambda: nn.MLPEncoder((), 3), r"MLPEncoder: data_shape is \(\)"),
        (lambda: nn.MLPDecoder(3, (4,), hidden=(0,)), r"MLPDecoder: hidden is \(0,\)"),
        (
            lambda: nn.ConvEncoder((8, 8), 3),
            r"data_shape is \(8, 8\), expected \(channels, height, width\)",
        ),
        (lambda: nn.ConvDecoder(3, (1, 8, 8), depth=0), "ConvDecoder"),
        (lambda: nn.ConvEncoder2d((1, 8, 8), 3, downsample=3), "downsample is 3, expected a power of two"),
        (lambda: nn.MLPEncoder((4,), 3, activation="swish"), "activation is 'swish', expected one of tanh, relu"),
        (lambda: nn.MLPEncoder((1, 8, 8), 3)(torch.rand(2, 8, 8)), r"x is \(2, 8, 8\), expected \(N, 1, 8, 8\)"),
        (lambda: nn.ConvDecoder(3, (1, 8, 8))(torch.rand(2, 4)), r"z is \(2, 4\), expected \(N, 3\)"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
