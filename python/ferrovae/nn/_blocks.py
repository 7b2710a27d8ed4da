"""Parts the encoders and decoders share: activations by name, initialisation, shape arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
}


def activation_named(name: str) -> nn.Module:
    """A new module of that activation; `ValueError` names the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def sizes(function: str, argument: str, values: Sequence[int], *, least: int = 0) -> tuple[int, ...]:
    """Positive integers as a tuple (JSON gives lists), at least `least` of them."""
    checked = tuple(int(value) for value in values)
    if len(checked) < least or any(value < 1 for value in checked):
        raise ValueError(f"{function}: {argument} is {tuple(values)}, expected {least or 'any number of'} sizes >= 1")
    return checked


def image_shape(function: str, data_shape: Sequence[int]) -> tuple[int, int, int]:
    """`data_shape` as (C, H, W)."""
    if len(data_shape) != 3:
        raise ValueError(f"{function}: data_shape is {tuple(data_shape)}, expected (channels, height, width)")
    channels, height, width = sizes(function, "data_shape", data_shape, least=3)
    return channels, height, width


def check_input(module: nn.Module, argument: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` as (N, *shape) in the module's dtype; `ValueError` when it is of another shape."""
    if tensor.ndim != len(shape) + 1 or tensor.shape[1:] != shape:
        expected = ", ".join(map(str, ("N", *shape)))
        raise ValueError(f"{type(module).__name__}: {argument} is {tuple(tensor.shape)}, expected ({expected})")
    return tensor.to(next(module.parameters()).dtype)


def halvings(size: tuple[int, int], times: int) -> list[tuple[int, int]]:
    """The sizes a stride-2 stack goes through, rounding up: (33, 17) -> (17, 9) -> (9, 5)."""
    result = [size]
    for _ in range(times):
        height, width = result[-1]
        result.append(((height + 1) // 2, (width + 1) // 2))
    return result


def initialise(module: nn.Module, gain: float) -> None:
    """Glorot weights times `gain` and zero biases, for every linear and convolutional layer inside `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            # a transposed convolution's output sees only one in stride^2 of its taps
            spread = layer.stride[0] if isinstance(layer, nn.ConvTranspose2d) else 1
            nn.init.xavier_uniform_(layer.weight, gain * spread)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def gain_of(activation: str) -> float:
    """The gain that keeps a deep stack's scale: 1 for tanh, as in the IWAE paper; more for rectifiers."""
    return {"tanh": 1.0, "gelu": 1.6, "silu": 1.7}.get(activation, math.sqrt(2))


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Linear and activation, for each pair of neighbouring sizes."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation_named(activation)]
    return nn.Sequential(*layers)


class Downsample(nn.Sequential):
    """Halve height and width, rounding up, any size down to 1: (N, C, H, W) -> (N, C', ceil(H/2), ceil(W/2))."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), activation_named(activation))


class Upsample(nn.Module):
    """Double height and width and crop to `size`: the inverse of `Downsample` in shape, also for odd sizes.

    The kernel is a multiple of the stride, so that no checkerboard is built in.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.convolution = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)[..., : self.size[0], : self.size[1]]


class Residual(nn.Module):
    """x + convolutions(activation(x)) at one resolution (van den Oord et al. 2017)."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            activation_named(activation),
            nn.Conv2d(width, max(width // 2, 1), 3, padding=1),
            activation_named(activation),
            nn.Conv2d(max(width // 2, 1), width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.body(x))


def stages(function: str, downsample: int) -> int:
    """How many halvings a `downsample` factor takes: log2 of it."""
    if downsample < 1 or downsample & (downsample - 1):
        raise ValueError(f"{function}: downsample is {downsample}, expected a power of two")
    return downsample.bit_length() - 1
