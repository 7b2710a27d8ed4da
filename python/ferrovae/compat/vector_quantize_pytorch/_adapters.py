"""How the 18 classes of vector-quantize-pytorch are swapped: each becomes the class of that name in `ferrovae.nn`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ferrovae.compat.adapter import CannotSwapError
from ferrovae.compat.rebuild import Rebuild
from ferrovae.compat.vector_quantize_pytorch._arguments import ARGUMENTS
from ferrovae.compat.vector_quantize_pytorch._names import SUBMODULES, resolve

PACKAGE = "vector_quantize_pytorch"


def _replacement(name: str) -> type[nn.Module]:
    try:
        return resolve(name)
    except AttributeError as why:
        raise CannotSwapError(f"ferrovae.nn has no {name}") from why


def _sequence(module: Any) -> dict[str, Any]:
    return {"*": tuple(module.fns)}


def _inner(module: nn.Module) -> Rebuild | None:
    return ADAPTERS.get((type(module).__module__, type(module).__qualname__))


def _adapter(name: str) -> Rebuild:
    arguments: dict[str, Callable[[Any], dict[str, Any]]] = {**ARGUMENTS, "Sequential": _sequence}
    return Rebuild(partial(_replacement, name), arguments[name], _inner)


ADAPTERS = {(f"{PACKAGE}.{submodule}", name): _adapter(name) for name, submodule in SUBMODULES.items()}
