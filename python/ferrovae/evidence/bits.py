"""Bits per dimension: the one place where nats become bits."""

from __future__ import annotations

import math
from typing import TypeVar

import torch

Nats = TypeVar("Nats", float, torch.Tensor)


def bits_per_dim(nats: Nats, dims: int, *, level_width: float = 1.0) -> Nats:
    """`-(nats + dims log level_width) / (dims log 2)`: code length per dimension, smaller is better.

    Args:
        nats: log p(x) of whole examples, a number or a tensor of any shape.
        dims: dimensions of one example, channels included (784 for MNIST, 3072 for CIFAR-10).
        level_width: width of one integer level in the units of x, for a density over dequantised levels: 1/127.5
            for levels scaled to [-1, 1], 1/256 for v/256. Leave it at 1 for a probability of discrete data.

    Raises:
        ValueError: `dims` is below 1, or `level_width` is not positive.
    """
    if dims < 1:
        raise ValueError(f"bits_per_dim: dims is {dims}, expected at least 1")
    if not level_width > 0:
        raise ValueError(f"bits_per_dim: level_width is {level_width}, expected a positive number")
    return (nats + dims * math.log(level_width)) / (-dims * math.log(2))
