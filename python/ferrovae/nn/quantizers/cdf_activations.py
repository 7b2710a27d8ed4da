"""Cumulative distribution functions, from the line to [0, 1], and their inverses."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import NamedTuple

from torch import Tensor

from ferrovae.nn.quantizers.checks import require


class CdfActivation(NamedTuple):
    """F and its inverse, elementwise."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _laplace(z: Tensor) -> Tensor:
    tail = (-z.abs()).exp() / 2
    return tail.where(z < 0, 1 - tail)


CDF_ACTIVATIONS = {
    "tanh": CdfActivation(lambda z: (z.tanh() + 1) / 2, lambda p: (2 * p - 1).atanh()),
    "sigmoid": CdfActivation(lambda z: z.sigmoid(), lambda p: p.logit()),
    "normal": CdfActivation(lambda z: (1 + (z / sqrt(2)).erf()) / 2, lambda p: (2 * p - 1).erfinv() * sqrt(2)),
    "laplace": CdfActivation(_laplace, lambda p: -(p - 0.5).sign() * (1 - 2 * (p - 0.5).abs()).log()),
    "cauchy": CdfActivation(lambda z: z.atan() / pi + 0.5, lambda p: ((p - 0.5) * pi).tan()),
}


def cdf_activation(layer: str, name: str) -> CdfActivation:
    """The activation of that name.

    Raises:
        ValueError: there is none.
    """
    require(layer, name in CDF_ACTIVATIONS, f"act_name is {name!r}, expected one of {sorted(CDF_ACTIVATIONS)}")
    return CDF_ACTIVATIONS[name]
