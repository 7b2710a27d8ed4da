"""The optimiser's state as named tensors, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ferrovae.training.errors import CheckpointError


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Adam's state by parameter: `encoder.0.weight/exp_avg`, `.../exp_avg_sq`, `.../step`."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor], path: Path
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        CheckpointError: a tensor belongs to no parameter, or has another shape; names it and `path`.
    """
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or (entry != "step" and value.shape != parameter.shape):
            raise CheckpointError(f"{path}: {key} of shape {tuple(value.shape)} does not fit the model's parameters")
        optimizer.state[parameter][entry] = value.to(parameter.device, copy=True)
