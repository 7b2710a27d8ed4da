"""The images to evaluate, from a tensor or a loader, and the state of the model while they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_AT_A_TIME = 1024  # images looked at for NaN in one go: the mask of a large tensor would not be small


@dataclass(frozen=True)
class Images:
    """x [B, ...] and the number of each image, int64 [B]: its position in the tensor, or its index in the dataset."""

    x: torch.Tensor
    index: torch.Tensor


def images(function: str, x: torch.Tensor | Iterable[Any]) -> Iterator[Images]:
    """The images of a tensor [N, ...] at once, or the valid ones of each of a `ferrovae.data.Loader`'s batches.

    Raises:
        TypeError: `x` is neither.
        ValueError: an image holds a NaN; its number is named.
    """
    if isinstance(x, torch.Tensor):
        if x.ndim < 2:
            raise ValueError(f"{function}: x is {tuple(x.shape)}, expected images (N, ...)")
        yield _checked(function, Images(x, torch.arange(len(x))))
        return
    if isinstance(x, (str, bytes)) or not isinstance(x, Iterable):
        raise TypeError(f"{function}: x is a {type(x).__name__}, expected a tensor or a ferrovae.data.Loader")
    for batch in x:
        if not (hasattr(batch, "x") and hasattr(batch, "index") and hasattr(batch, "valid")):
            raise TypeError(
                f"{function}: x yields {type(batch).__name__}, expected a ferrovae.data.Loader, which yields "
                "batches with x, index and valid"
            )
        if bool(batch.valid.all()):
            yield _checked(function, Images(batch.x, batch.index.cpu()))
        else:
            yield _checked(function, Images(batch.x[batch.valid], batch.index[batch.valid].cpu()))


def _checked(function: str, batch: Images) -> Images:
    for x, index in zip(batch.x.split(_AT_A_TIME), batch.index.split(_AT_A_TIME), strict=True):
        bad = torch.isnan(x).flatten(1).any(1)
        if bool(bad.any()):
            raise ValueError(f"{function}: x is NaN in image {int(index[bad.cpu()][0])}")
    return batch


def count(x: torch.Tensor | Iterable[Any]) -> int | None:
    """How many images `images` will yield, where that is known beforehand."""
    if isinstance(x, torch.Tensor):
        return len(x)
    partial = getattr(x, "drop_last", False) or getattr(x, "world_size", 1) != 1 or getattr(x, "position", 0)
    if partial or not hasattr(x, "dataset"):
        return None
    return len(x.dataset)


def device_of(model: Any, x: torch.Tensor) -> torch.device:
    """Where the model computes: the device of its first parameter or buffer, else that of `x`."""
    if isinstance(model, torch.nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return x.device


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, no gradients; every module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, torch.nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
