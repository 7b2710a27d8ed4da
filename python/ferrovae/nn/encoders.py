"""Encoder presets: images or vectors to the moments of q(z|x), or to a grid of vectors for a quantizer.

Constructors take plain JSON values, so that a configuration file can name them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ferrovae.nn import _blocks as blocks

__all__ = ["ConvEncoder", "ConvEncoder2d", "MLPEncoder"]


class MLPEncoder(nn.Module):
    """Fully connected: x (N, *data_shape) -> moments (N, 2 * latent_dim), mean then log-variance.

    Args:
        data_shape: shape of one x.
        latent_dim: D.
        hidden: widths of the hidden layers.
        activation: its name: tanh, relu, leaky_relu, gelu, silu, elu or softplus.

    The defaults are the one-layer network of the IWAE paper (Burda et al. 2016), with torch's own initial weights:
    on MNIST these learn faster than Glorot's.
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.data_shape = blocks.sizes("MLPEncoder", "data_shape", data_shape, least=1)
        self.latent_shape = blocks.sizes("MLPEncoder", "latent_dim", (latent_dim,))
        widths = (math.prod(self.data_shape), *blocks.sizes("MLPEncoder", "hidden", hidden))
        self.body = blocks.mlp(widths, activation)
        self.head = nn.Linear(widths[-1], 2 * latent_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(blocks.check_input(self, "x", x, self.data_shape).flatten(1)))


class ConvEncoder(nn.Module):
    """Strided convolutions and a linear head: x (N, C, H, W) -> moments (N, 2 * latent_dim), any H and W.

    Args:
        data_shape: (C, H, W).
        latent_dim: D.
        width: channels of the first stage; doubled by each further one, up to 8 times.
        depth: stages, each of which halves the image.
        activation: its name.
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int,
        width: int = 32,
        depth: int = 2,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.data_shape = blocks.image_shape("ConvEncoder", data_shape)
        self.latent_shape = blocks.sizes("ConvEncoder", "latent_dim", (latent_dim,))
        channels, height, breadth = self.data_shape
        widths = stage_widths("ConvEncoder", width, depth)
        rows, columns = blocks.halvings((height, breadth), depth)[-1]
        pairs = zip((channels, *widths), widths, strict=False)
        self.body = nn.Sequential(*(blocks.Downsample(inputs, outputs, activation) for inputs, outputs in pairs))
        self.head = nn.Linear(widths[-1] * rows * columns, 2 * latent_dim)
        blocks.initialise(self.body, blocks.gain_of(activation))
        blocks.initialise(self.head, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(blocks.check_input(self, "x", x, self.data_shape)).flatten(1))


class ConvEncoder2d(nn.Module):
    """Keeps the plane: x (N, C, H, W) -> vectors (N, dim, ceil(H / downsample), ceil(W / downsample)).

    For a quantizer of `dim` features; with `dim` twice the latent channels it gives the moments of a VAE whose z
    is a plane (pass `VAE` a decoder that knows its latent shape, such as `ConvDecoder2d`).

    Args:
        data_shape: (C, H, W).
        dim: channels of the result.
        downsample: a power of two.
        width: channels inside.
        activation: its name.
        residual_blocks: how many after the strided convolutions.

    Attributes:
        grid: the plane (rows, columns) of the result; `latent_shape` is (dim, rows, columns).
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        dim: int,
        downsample: int = 4,
        width: int = 64,
        activation: str = "relu",
        residual_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.data_shape = blocks.image_shape("ConvEncoder2d", data_shape)
        dim, width = blocks.sizes("ConvEncoder2d", "(dim, width)", (dim, width))
        depth = blocks.stages("ConvEncoder2d", downsample)
        channels, height, breadth = self.data_shape
        self.grid = blocks.halvings((height, breadth), depth)[-1]
        self.latent_shape = (dim, *self.grid)
        inputs = (channels, *[width] * (depth - 1))
        self.body = nn.Sequential(
            *(blocks.Downsample(size, width, activation) for size in inputs[:depth]),
            nn.Conv2d(width if depth else channels, width, 3, padding=1),
            *(blocks.Residual(width, activation) for _ in range(residual_blocks)),
            blocks.activation_named(activation),
        )
        self.head = nn.Conv2d(width, dim, 1)
        blocks.initialise(self.body, blocks.gain_of(activation))
        blocks.initialise(self.head, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(blocks.check_input(self, "x", x, self.data_shape)))


def stage_widths(function: str, width: int, depth: int) -> tuple[int, ...]:
    """Channels after each of `depth` stages: doubled each time, up to 8 times the first."""
    width, depth = blocks.sizes(function, "(width, depth)", (width, depth))
    return tuple(width * 2 ** min(stage, 3) for stage in range(depth))
