"""Configuration, the training loop and checkpoints. Free of torch at import: the command line reads it for `--help`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ferrovae.training.configuration import TrainVAE, TrainVQVAE
from ferrovae.training.errors import CheckpointError, ConfigurationError, Interrupted, NonFiniteError

if TYPE_CHECKING:
    from ferrovae.training.loop import Outcome, resume, train
    from ferrovae.training.run import load, read_metrics

_LAZY = {"Outcome": "loop", "load": "run", "read_metrics": "run", "resume": "loop", "train": "loop"}

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "Interrupted",
    "NonFiniteError",
    "Outcome",
    "TrainVAE",
    "TrainVQVAE",
    "load",
    "read_metrics",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"ferrovae.training.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'ferrovae.training' has no attribute {name!r}")
