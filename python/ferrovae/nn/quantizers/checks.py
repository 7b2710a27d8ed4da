"""What every quantizer asks of its arguments, and how it complains."""

from __future__ import annotations

from torch import Tensor, nn


def require(layer: nn.Module | str, condition: bool, complaint: str) -> None:
    """ValueError, led by the layer's name, unless the condition holds."""
    if not condition:
        raise ValueError(f"{_name(layer)}: {complaint}")


def check_floating(layer: nn.Module | str, argument: str, x: Tensor) -> None:
    """TypeError unless x is floating point."""
    if not x.is_floating_point():
        raise TypeError(f"{_name(layer)}: {argument} is {x.dtype}, expected a floating-point dtype")


def check_channels(layer: nn.Module | str, x: Tensor, channels: int, axis: int, expected: str) -> None:
    """ValueError unless axis `axis` of x holds `channels`; `expected` describes the whole shape."""
    fits = -x.ndim <= axis < x.ndim and x.shape[axis] == channels
    require(layer, fits, f"x is {tuple(x.shape)}, expected {expected}")


def _name(layer: nn.Module | str) -> str:
    return layer if isinstance(layer, str) else type(layer).__name__
