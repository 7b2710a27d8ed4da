"""What is done to an example on its way into a batch, in Rust; results are float32.

The value v of a byte x is x / 255; a float is its own value. Random transforms draw from a stream keyed by (seed,
epoch, index of the example): the same bits for any batch size, thread count, rank or order of calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Scale:
    """low + (high - low) v: [0, 1] to [low, high]. For bytes, `Scale()` gives the bits of `x.float() / 255`."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low != self.high):
            raise ValueError(f"Scale: [{self.low}, {self.high}] is no interval")


@dataclass(frozen=True)
class Binarize:
    """1 with probability v, else 0: a new draw each epoch (Salakhutdinov and Murray, 2008).

    The probability of a byte is off by at most 2^-17; floats are cut to [0, 1] and have 24 bits.
    """


@dataclass(frozen=True)
class Dequantize:
    """(x + u) / 256 of a byte x with u uniform on [0, 1) in steps of 2^-16 (Theis et al., 2016); below 1."""


Transform = Scale | Binarize | Dequantize
# The draw, then a factor and a term.
Spec = tuple[str, float, float]


def as_tuple(transform: Transform | Sequence[Transform] | None) -> tuple[Transform, ...]:
    """The transforms in order; None and an empty sequence are none."""
    if transform is None:
        return ()
    transforms = (transform,) if isinstance(transform, Transform) else tuple(transform)
    for entry in transforms:
        if not isinstance(entry, Transform):
            raise TypeError(f"Loader: transform is {entry!r}, expected Scale, Binarize, Dequantize or a list of them")
    return transforms


def compiled(transforms: tuple[Transform, ...], dtype: torch.dtype) -> Spec | None:
    """The transforms as one draw and one affine map; None copies the elements as they are.

    Raises:
        ValueError: a draw comes after another transform that changes values, or needs bytes.
    """
    if not transforms:
        return None
    draw, factor, term = "nothing", 1.0, 0.0
    for entry in transforms:
        if isinstance(entry, Scale):
            width = entry.high - entry.low
            factor, term = factor * width, term * width + entry.low
            continue
        name = type(entry).__name__
        if (draw, factor, term) != ("nothing", 1.0, 0.0):
            raise ValueError(f"Loader: {name}() works on the values of the dataset, so it comes first in transform")
        if isinstance(entry, Dequantize) and dtype != torch.uint8:
            raise ValueError(f"Loader: Dequantize() adds noise to bytes, but the dataset is {dtype}")
        draw = name.lower()
    return draw, factor, term


def described(transforms: tuple[Transform, ...]) -> list[dict[str, Any]]:
    """The transforms as JSON values."""
    return [{"name": type(entry).__name__, **asdict(entry)} for entry in transforms]
