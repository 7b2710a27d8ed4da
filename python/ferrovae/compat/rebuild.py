"""Swapping by construction: a layer of ours is made with a module's arguments and takes its place and its tensors.

The module stays the object it is, and gets the class and the attributes of ours. The arguments have to be read off the
module, so they are put to the test: another module of the original class, made with them, must not differ from it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ferrovae.compat.adapter import CannotSwapError
from ferrovae.compat.handover import HOOKS, give_back, take_hooks, take_tensors
from ferrovae.compat.sameness import PLAIN, check_same, same

_SAVED = "_ferrovae_original"


@dataclass
class _Original:
    """What a swapped module was."""

    kind: type[nn.Module]
    attributes: dict[str, Any]
    replaced_by: dict[str, Any]
    """The plain attributes it had right after the swap, None for others: what differs from them later is news."""


@dataclass
class Built:
    """A layer of ours that can take the place of `module`."""

    module: nn.Module
    ours: nn.Module
    extras: dict[str, Any]
    """Attributes that the module was given by others."""
    inner: list[Built] = field(default_factory=list)

    def commit(self) -> None:
        """Give the module the class and the attributes of ours."""
        for built in self.inner:
            built.commit()
            for owner in self.ours.modules():
                slots = owner._modules
                slots.update({name: built.module for name, child in slots.items() if child is built.ours})
        saved = _Original(type(self.module), dict(vars(self.module)), _plain(vars(self.ours) | self.extras))
        for hooks in (getattr(self.ours, name) for name in HOOKS):
            for hook in hooks.values():
                # Hooks of the layer's own that know it by a weak reference.
                if getattr(hook, "with_module", False) and hook.module() is self.ours:
                    hook.module = weakref.ref(self.module)
        vars(self.module).clear()
        vars(self.module).update(vars(self.ours), **self.extras, **{_SAVED: saved})
        setattr(self.module, "__class__", type(self.ours))  # noqa: B010


@dataclass(frozen=True)
class Rebuild:
    """Adapter that makes a layer of ours with the arguments of a module.

    Args:
        replacement: gives the class of ours; raises `CannotSwapError` if there is none.
        arguments: reads the constructor's arguments (the positional ones under "*") off a module.
        inner: gives the adapter of a module among the arguments, if it is to be swapped too.
    """

    replacement: Callable[[], type[nn.Module]]
    arguments: Callable[[Any], dict[str, Any]]
    inner: Callable[[nn.Module], Rebuild | None] = lambda _: None
    whole: bool = True

    def prepare(self, module: nn.Module) -> Callable[[], None]:
        """See `Adapter`."""
        return self.build(module).commit

    def build(self, module: nn.Module) -> Built:
        """A layer of ours with the tensors, hooks and modes of `module`."""
        kind, defaults = self.replacement(), _defaults(module)
        with torch.random.fork_rng(devices=[]):
            again = _make(type(module), self.arguments(module), defaults)
            check_same(module, again)
            given, inner = self._swap_inner(self.arguments(module))
            ours = _make(kind, given, defaults)
        extras = {name: value for name, value in vars(module).items() if name not in vars(again)}
        hidden = [name for name in extras if hasattr(kind, name)]
        if hidden:
            raise CannotSwapError(f"{hidden[0]} was replaced on this one object")
        take_tensors(ours, module)
        take_hooks(ours, module)
        return Built(module, ours, extras, inner)

    def _swap_inner(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Built]]:
        built: list[Built] = []

        def swapped(value: Any) -> Any:
            if isinstance(value, nn.Module):
                adapter = self.inner(value)
                if adapter is None:
                    return value
                built.append(adapter.build(value))
                return built[-1].ours
            return tuple(swapped(item) for item in value) if type(value) is tuple else value

        return {name: swapped(value) for name, value in arguments.items()}, built


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a rebuilt module had; None if it is not one."""
    saved = vars(module).get(_SAVED)
    return None if saved is None else saved.kind


def undo_rebuild(module: nn.Module) -> None:
    """Make a rebuilt module what it was, with the tensors, hooks and modes it has now."""
    saved = vars(module).get(_SAVED)
    if saved is None:
        return
    old = saved.kind.__new__(saved.kind)
    vars(old).update(saved.attributes)
    for name, value in vars(module).items():
        set_since = (
            name in saved.attributes and isinstance(value, PLAIN) and saved.replaced_by.get(name, value) != value
        )
        if set_since or (name not in saved.replaced_by and name != _SAVED):
            vars(old)[name] = value
    give_back(old, module)
    vars(module).clear()
    vars(module).update(vars(old))
    setattr(module, "__class__", saved.kind)  # noqa: B010


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, PLAIN) else None for name, value in attributes.items()}


def _make(kind: type[nn.Module], arguments: dict[str, Any], defaults: dict[str, Any]) -> nn.Module:
    """An instance; what it takes through others, or not at all, is passed only if it is not the default."""
    known = inspect.signature(kind).parameters
    given = {
        name: value
        for name, value in arguments.items()
        if name != "*" and (name in known or name not in defaults or not same(value, defaults[name]))
    }
    try:
        return kind(*arguments.get("*", ()), **given)
    except (AssertionError, TypeError, ValueError) as why:
        raise CannotSwapError(f"{kind.__module__}.{kind.__qualname__} cannot be made like it: {why}") from why


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Of the constructor's arguments, also of those that it passes on to its parts."""
    package = type(module).__module__.partition(".")[0]
    kinds = dict.fromkeys(type(part) for part in module.modules() if type(part).__module__.startswith(package))
    return {
        name: parameter.default
        for kind in reversed(kinds)
        for name, parameter in inspect.signature(kind).parameters.items()
    }
