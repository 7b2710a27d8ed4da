"""What swapping one module takes: find out whether it can be done, do it, undo it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn


class CannotSwapError(Exception):
    """Why a module is left as it is; the message completes "left, because ..."."""


class Adapter(Protocol):
    """How instances of one class of another library are swapped."""

    @property
    def whole(self) -> bool:
        """Whether the modules inside belong to it, and stay as they are where it does."""

    def prepare(self, module: nn.Module) -> Callable[[], None]:
        """What swaps `module` in place, its identity kept; changes nothing itself.

        Raises:
            CannotSwapError: it would not be the same layer afterwards.
        """
