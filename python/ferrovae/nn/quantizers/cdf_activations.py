"""Cumulative distribution functions, from the line to [0, 1], and their inverses."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ferrovae.nn.quantizers.checks import require


class CdfActivation(NamedTuple):
    """F and its inverse, elementwise."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _tanh(z: Tensor) -> Tensor:
    return (z.tanh() + 1) / 2


def _tanh_inverse(p: Tensor) -> Tensor:
    return (2 * p - 1).atanh()


def _normal(z: Tensor) -> Tensor:
    return (1 + (z / sqrt(2)).erf()) / 2


def _normal_inverse(p: Tensor) -> Tensor:
    return (2 * p - 1).erfinv() * sqrt(2)


def _laplace(z: Tensor) -> Tensor:
    tail = (-z.abs()).exp() / 2
    return tail.where(z < 0, 1 - tail)


def _laplace_inverse(p: Tensor) -> Tensor:
    return -(p - 0.5).sign() * (1 - 2 * (p - 0.5).abs()).log()


def _cauchy(z: Tensor) -> Tensor:
    return z.atan() / pi + 0.5


def _cauchy_inverse(p: Tensor) -> Tensor:
    return ((p - 0.5) * pi).tan()


# Named functions, so that a layer that holds them can be pickled.
CDF_ACTIVATIONS = {
    "tanh": CdfActivation(_tanh, _tanh_inverse),
    "sigmoid": CdfActivation(torch.sigmoid, torch.logit),
    "normal": CdfActivation(_normal, _normal_inverse),
    "laplace": CdfActivation(_laplace, _laplace_inverse),
    "cauchy": CdfActivation(_cauchy, _cauchy_inverse),
}


def cdf_activation(layer: str, name: str) -> CdfActivation:
    """The activation of that name.

    Raises:
        ValueError: there is none.
    """
    require(layer, name in CDF_ACTIVATIONS, f"act_name is {name!r}, expected one of {sorted(CDF_ACTIVATIONS)}")
    return CDF_ACTIVATIONS[name]
