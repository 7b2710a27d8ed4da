"""ferrovae: variational autoencoders for PyTorch, with fused operations and a log p(x) you can trust.

Everything is imported on first use, so that `import ferrovae` and `ferrovae --help` cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrovae import compat, data, evidence, likelihoods, models, nn, ops, priors, training
    from ferrovae.compat import accelerate, restore
    from ferrovae.models import VAE, VQVAE
    from ferrovae.ops import BackendWarning, use_backend
    from ferrovae.training.run import load

__version__ = "0.1.0"

_MODULES = ("compat", "data", "evidence", "likelihoods", "models", "nn", "ops", "priors", "training")
_NAMES = {
    "VAE": "models",
    "VQVAE": "models",
    "BackendWarning": "ops",
    "accelerate": "compat",
    "restore": "compat",
    "use_backend": "ops",
    "load": "training.run",
}

__all__ = [
    "VAE",
    "VQVAE",
    "BackendWarning",
    "accelerate",
    "compat",
    "data",
    "evidence",
    "likelihoods",
    "load",
    "models",
    "nn",
    "ops",
    "priors",
    "restore",
    "training",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"ferrovae.{name}")
    if name in _NAMES:
        return getattr(import_module(f"ferrovae.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'ferrovae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
