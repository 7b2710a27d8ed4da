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
from ferrovae.compat.transformers import dac, encodec, mimi

# (module, class) -> adapter.
KNOWN: dict[tuple[str, str], Adapter] = {
    **encodec.ADAPTERS,
    **dac.ADAPTERS,
    **mimi.ADAPTERS,
    **diffusers.ADAPTERS,
}


def adapter_of(kind: type[Any]) -> Adapter | None:
    """The adapter of exactly this class."""
    adapter = KNOWN.get((kind.__module__, kind.__qualname__))
    module = sys.modules.get(kind.__module__)
    # A class of the same name made elsewhere is another class.
    return adapter if getattr(module, kind.__qualname__, None) is kind else None


def known_base(module: nn.Module) -> type[nn.Module] | None:
    """The known class that this module's class is derived from, if it is not an overlaid one."""
    if isinstance(module, Overlaid):
        return None
    return next((base for base in type(module).__mro__[1:] if adapter_of(base) is not None), None)
