"""Every class that `accelerate` knows, and who swaps it: one line a library; later ones stand beside these.

No library is imported to recognise its classes: a model that holds one has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ferrovae.compat import diffusers
from ferrovae.compat.adapter import Adapter
from ferrovae.compat.overlay import Overlaid
from ferrovae.compat.rebuild import original_class
from ferrovae.compat.transformers import dac, encodec, mimi
from ferrovae.compat.vector_quantize_pytorch import _adapters as vector_quantize_pytorch

# (module, class) -> adapter.
KNOWN: dict[tuple[str, str], Adapter] = {
    **encodec.ADAPTERS,
    **dac.ADAPTERS,
    **mimi.ADAPTERS,
    **diffusers.ADAPTERS,
    **vector_quantize_pytorch.ADAPTERS,
}


def adapter_of(kind: type[Any]) -> Adapter | None:
    """The adapter of exactly this class."""
    adapter = KNOWN.get((kind.__module__, kind.__qualname__))
    module = sys.modules.get(kind.__module__)
    # A class of the same name made elsewhere is another class.
    return adapter if getattr(module, kind.__qualname__, None) is kind else None


def class_before(module: nn.Module) -> type[nn.Module] | None:
    """The class that a swapped module had; None if the module is not swapped."""
    return module.original if isinstance(module, Overlaid) else original_class(module)


def known_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The known class, other than itself, that a class is derived from."""
    return next((base for base in kind.__mro__[1:] if adapter_of(base) is not None), None)
