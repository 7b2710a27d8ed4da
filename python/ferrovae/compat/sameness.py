"""Whether two modules of one class were made with the same arguments, as far as they show it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ferrovae.compat.adapter import CannotSwapError
from ferrovae.compat.handover import own_tensors

PLAIN = (int, float, bool, str, tuple, list, type(None), torch.dtype)


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, PLAIN) and a == b


def check_same(module: nn.Module, again: nn.Module) -> None:
    """CannotSwapError unless the two agree in structure, options and shapes."""
    mine, other = (dict(m.named_modules(remove_duplicate=False)) for m in (module, again))
    if {path: type(m) for path, m in mine.items()} != {path: type(m) for path, m in other.items()}:
        raise CannotSwapError("its parts are not those its constructor makes")
    for path, part in mine.items():
        if part is other[path]:
            continue
        for name, value in vars(other[path]).items():
            if name.startswith("_") or name == "training" or name not in vars(part):
                continue
            found = vars(part)[name]
            plain = isinstance(value, PLAIN) and isinstance(found, PLAIN)
            if plain and list(_flat(value)) != list(_flat(found)):
                where = f"{path}.{name}" if path else name
                raise CannotSwapError(f"{where} is {found}, where its constructor's arguments would make it {value}")
        # What the first batch fills is not there yet in a new one.
        later = {name for name, buffer in other[path]._buffers.items() if buffer is None}
        if {name: t for name, t in _shapes(part).items() if name not in later} != _shapes(other[path]):
            raise CannotSwapError(f"the tensors of {path or 'it'} are not those its constructor makes")
        for name in part._non_persistent_buffers_set:
            a, b = part._buffers[name], other[path]._buffers[name]
            if a is not None and b is not None and not a.is_meta and not torch.equal(a.cpu().to(b.dtype), b.cpu()):
                raise CannotSwapError(f"the constant {name} is not what its constructor makes")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, PLAIN):
        yield value


def _shapes(part: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in own_tensors(part).items()}
