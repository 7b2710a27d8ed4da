"""Swapping by class: the module stays the object it is and gets a class that computes a few methods our way.

So parameters, buffers, hooks, sharing, mode, dtype and device are not kept but never touched, and `isinstance` of the
original class goes on to hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from ferrovae.compat.adapter import CannotSwapError


class Overlaid:
    """Base of the methods that are laid over another library's class."""

    overlay: ClassVar[type[Overlaid]]
    original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: copies and pickles name what it is made of.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return _blank, (self.overlay, self.original), *reduced[2:]


_CLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def overlaid_class(overlay: type[Overlaid], original: type[nn.Module]) -> type[nn.Module]:
    """The one class that has `overlay`'s methods before `original`'s."""
    if (overlay, original) not in _CLASSES:
        members = {"overlay": overlay, "original": original, "__doc__": overlay.__doc__}
        members["__module__"] = overlay.__module__
        _CLASSES[overlay, original] = type(f"Accelerated{original.__name__}", (overlay, original), members)
    return _CLASSES[overlay, original]


def _blank(overlay: type[Overlaid], original: type[nn.Module]) -> nn.Module:
    kind = overlaid_class(overlay, original)
    return kind.__new__(kind)


@dataclass(frozen=True)
class Overlay:
    """Adapter that lays the methods of `methods` over a module's class.

    Args:
        methods: a subclass of `Overlaid`; each of its methods replaces one of the same name and parameters.
        check: raises `CannotSwapError` for a module that the methods would not serve.
        whole: as in `Adapter`.
    """

    methods: type[Overlaid]
    check: Callable[[Any], None] | None = None
    whole: bool = False

    def prepare(self, module: nn.Module) -> Callable[[], None]:
        """See `Adapter`."""
        original = type(module)
        for name, ours in vars(self.methods).items():
            if not inspect.isfunction(ours):
                continue
            # Libraries that move weights about, and users, put functions there; ours would never be called.
            if name in vars(module):
                raise CannotSwapError(f"{name} was replaced on this one object")
            theirs = getattr(original, name, None)
            if theirs is None or _parameters(theirs) != _parameters(ours):
                raise CannotSwapError(f"this version's {original.__name__}.{name} takes other arguments than known")
        if self.check is not None:
            self.check(module)
        return partial(setattr, module, "__class__", overlaid_class(self.methods, original))


def remove_overlay(module: nn.Module) -> None:
    """Give an overlaid module its own class back.

    Raises:
        CannotSwapError: something else has made a class of the overlaid one since.
    """
    if not isinstance(module, Overlaid):
        return
    made: object = overlaid_class(module.overlay, module.original)
    if type(module) is not made:
        raise CannotSwapError(f"its class is now {type(module).__name__}: undo what made that one first")
    setattr(module, "__class__", module.original)  # noqa: B010


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def require_exactly(module: Any, *names: str) -> None:
    """CannotSwapError unless the class of `module`, or the one its overlay hides, has one of these names.

    What its container computes in one call must not hide a method that somebody has changed.
    """
    kind = module.original if isinstance(module, Overlaid) else type(module)
    if kind.__name__ not in names:
        raise CannotSwapError(f"it holds a {kind.__name__}, expected {' or '.join(names)}")
    changed = [name for name in ("encode", "decode", "quantize", "forward") if name in vars(module)]
    if changed:
        raise CannotSwapError(f"{changed[0]} was replaced on the {kind.__name__} inside")
