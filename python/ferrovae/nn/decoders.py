"""Decoder presets: z to the parameters of p(x|z), stacked along dim 1; mirrors of the encoders.

`channels` is how many parameters the likelihood takes per channel of data (`Likelihood.channels`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ferrovae.nn import _blocks as blocks
from ferrovae.nn.encoders import stage_widths

__all__ = ["ConvDecoder", "ConvDecoder2d", "MLPDecoder"]


class MLPDecoder(nn.Module):
    """Fully connected: z (N, latent_dim) -> parameters (N, channels * C, ...) for data of shape (C, ...).

    Args:
        latent_dim: D.
        data_shape: shape of one x.
        hidden: widths of the hidden layers, from z to x.
        activation: its name: tanh, relu, leaky_relu, gelu, silu, elu or softplus.
        channels: parameters per channel of data.
    """

    def __init__(
        self,
        latent_dim: int,
        data_shape: Sequence[int],
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.latent_shape = blocks.sizes("MLPDecoder", "latent_dim", (latent_dim,))
        self.data_shape = blocks.sizes("MLPDecoder", "data_shape", data_shape, least=1)
        self.channels = channels
        widths = (latent_dim, *blocks.sizes("MLPDecoder", "hidden", hidden))
        self.body = blocks.mlp(widths, activation)
        self.head = nn.Linear(widths[-1], channels * math.prod(self.data_shape))

    def forward(self, z: Tensor) -> Tensor:
        parameters = self.head(self.body(blocks.check_input(self, "z", z, self.latent_shape)))
        return parameters.reshape(-1, self.channels * self.data_shape[0], *self.data_shape[1:])


class ConvDecoder(nn.Module):
    """A linear layer and transposed convolutions: z (N, latent_dim) -> parameters (N, channels * C, H, W).

    Args:
        latent_dim: D.
        data_shape: (C, H, W), any H and W.
        width, depth: as of `ConvEncoder`, which it mirrors.
        activation: its name.
        channels: parameters per channel of data.
    """

    def __init__(
        self,
        latent_dim: int,
        data_shape: Sequence[int],
        width: int = 32,
        depth: int = 2,
        activation: str = "gelu",
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.latent_shape = blocks.sizes("ConvDecoder", "latent_dim", (latent_dim,))
        self.data_shape = blocks.image_shape("ConvDecoder", data_shape)
        self.channels = channels
        widths = stage_widths("ConvDecoder", width, depth)[::-1]
        planes = blocks.halvings(self.data_shape[1:], depth)[::-1]
        self.plane = (widths[0], *planes[0])
        self.stem = nn.Linear(latent_dim, math.prod(self.plane))
        layers: list[nn.Module] = [blocks.activation_named(activation)]
        for inputs, outputs, size in zip(widths, (*widths[1:], width), planes[1:], strict=True):
            layers += [blocks.Upsample(inputs, outputs, size), blocks.activation_named(activation)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, channels * self.data_shape[0], 3, padding=1)
        blocks.initialise(self.stem, blocks.gain_of(activation))
        blocks.initialise(self.body, blocks.gain_of(activation))
        blocks.initialise(self.head, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        vectors = self.stem(blocks.check_input(self, "z", z, self.latent_shape))
        return self.head(self.body(vectors.reshape(-1, *self.plane)))


class ConvDecoder2d(nn.Module):
    """From a plane of vectors: z (N, dim, *grid) -> parameters (N, channels * C, H, W); mirrors `ConvEncoder2d`.

    Args:
        dim: channels of z.
        data_shape: (C, H, W), any H and W.
        downsample, width, activation, residual_blocks: as of `ConvEncoder2d`.
        channels: parameters per channel of data.
    """

    def __init__(
        self,
        dim: int,
        data_shape: Sequence[int],
        downsample: int = 4,
        width: int = 64,
        activation: str = "relu",
        residual_blocks: int = 2,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.data_shape = blocks.image_shape("ConvDecoder2d", data_shape)
        dim, width = blocks.sizes("ConvDecoder2d", "(dim, width)", (dim, width))
        depth = blocks.stages("ConvDecoder2d", downsample)
        planes = blocks.halvings(self.data_shape[1:], depth)[::-1]
        self.grid = planes[0]
        self.latent_shape = (dim, *self.grid)
        self.channels = channels
        layers: list[nn.Module] = [nn.Conv2d(dim, width, 3, padding=1)]
        layers += [blocks.Residual(width, activation) for _ in range(residual_blocks)]
        layers.append(blocks.activation_named(activation))
        for size in planes[1:]:
            layers += [blocks.Upsample(width, width, size), blocks.activation_named(activation)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, channels * self.data_shape[0], 3, padding=1)
        blocks.initialise(self.body, blocks.gain_of(activation))
        blocks.initialise(self.head, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.body(blocks.check_input(self, "z", z, self.latent_shape)))
