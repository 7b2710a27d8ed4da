"""Swapping by construction: a layer of ours is made with a module's arguments and takes its place and its tensors.

The module stays the object it is, and gets the class and the attributes of ours. The arguments have to be read off the
module, so they are put to the test: another module of the original class, made with them, must not differ from it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.compat.adapter import CannotSwapError

_SAVED = "_ferrovae_original"
_PLAIN = (int, float, bool, str, tuple, list, type(None), torch.dtype)
_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass
class _Original:
    """What a swapped module was."""

    kind: type[nn.Module]
    attributes: dict[str, Any]


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
        saved = _Original(type(self.module), dict(vars(self.module)))
        for hooks in (getattr(self.ours, name) for name in _HOOKS):
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
            _check_same(module, again)
            given, inner = self._swap_inner(self.arguments(module))
            ours = _make(kind, given, defaults)
        extras = {name: value for name, value in vars(module).items() if name not in vars(again)}
        hidden = [name for name in extras if hasattr(kind, name)]
        if hidden:
            raise CannotSwapError(f"{hidden[0]} was replaced on this one object")
        _take_tensors(ours, module)
        _take_hooks(ours, module)
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
    _give_back(old, module)
    vars(module).clear()
    vars(module).update(vars(old))
    setattr(module, "__class__", saved.kind)  # noqa: B010


def _make(kind: type[nn.Module], arguments: dict[str, Any], defaults: dict[str, Any]) -> nn.Module:
    """An instance; what it takes through others, or not at all, is passed only if it is not the default."""
    known = inspect.signature(kind).parameters
    given = {
        name: value
        for name, value in arguments.items()
        if name != "*" and (name in known or name not in defaults or not _same(value, defaults[name]))
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


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, _PLAIN) and a == b


def _check_same(module: nn.Module, again: nn.Module) -> None:
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
            plain = isinstance(value, _PLAIN) and isinstance(found, _PLAIN)
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
    elif isinstance(value, _PLAIN):
        yield value


def _own(part: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module itself, by name."""
    both = [*part._parameters.items(), *part._buffers.items()]
    return {name: tensor for name, tensor in both if tensor is not None}


def _shapes(part: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _own(part).items()}


def _saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state by key, without the hooks that may rename it."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, part in module.named_modules(remove_duplicate=False)
        for name, tensor in _own(part).items()
        if name not in part._non_persistent_buffers_set
    }


def _take_tensors(ours: nn.Module, module: nn.Module) -> None:
    """Ours gets the state of the module, and wherever shape and dtype allow the very tensors."""
    state = _saved_tensors(module)
    like = next((tensor for tensor in state.values() if tensor.is_floating_point()), None)
    if like is None:
        like = next(iter([*state.values(), *module.buffers()]), None)
    if like is not None:
        ours.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
    try:
        with torch.no_grad():
            ours.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, strict=True)
    except RuntimeError as why:
        raise CannotSwapError(f"{type(ours).__name__} does not take its state: {why}") from why
    parts = dict(module.named_modules(remove_duplicate=False))
    for path, part in ours.named_modules(remove_duplicate=False):
        theirs = parts.get(path)
        if theirs is None or theirs is part:
            continue
        for name, tensor in _own(part).items():
            found = _own(theirs).get(name)
            fits = found is not None and (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
            if isinstance(tensor, nn.Parameter) and not (fits and isinstance(found, nn.Parameter)):
                raise CannotSwapError(
                    f"{path}.{name} is no parameter of shape {tuple(tensor.shape)} and {tensor.dtype}"
                )
            if fits:
                (part._parameters if name in part._parameters else part._buffers)[name] = found


def _take_hooks(ours: nn.Module, module: nn.Module) -> None:
    """Modes and hooks, by path; hooks in the very dictionaries, so that their handles still remove them."""
    parts = dict(ours.named_modules())
    ours.train(module.training)
    for path, theirs in module.named_modules():
        part = parts.get(path)
        if part is theirs:
            continue
        hooked = [name for name in _HOOKS if getattr(theirs, name)]
        if part is None:
            if hooked:
                raise CannotSwapError(f"{path} has hooks, and {type(ours).__name__} has no such part")
            continue
        part.training = theirs.training
        part._is_full_backward_hook = theirs._is_full_backward_hook
        for name in _HOOKS:
            own = getattr(part, name)
            setattr(part, name, {**getattr(theirs, name), **own} if own else getattr(theirs, name))


def _give_back(old: nn.Module, module: nn.Module) -> None:
    """The tensors and modes of the module, and what they are on, go back into the parts it had."""
    parts = dict(module.named_modules(remove_duplicate=False))
    like = next(iter(_saved_tensors(module).values()), None)
    for path, part in old.named_modules(remove_duplicate=False):
        now = parts.get(path)
        part.training = module.training if now is None else now.training
        if now is part:
            continue
        tensors = {} if now is None else _own(now)
        for slots in (part._parameters, part._buffers):
            for name, tensor in slots.items():
                found = tensors.get(name)
                if found is not None and tensor is not None:
                    same = found.dtype == tensor.dtype or isinstance(found, nn.Parameter)
                    slots[name] = found if same else found.to(tensor.dtype)
                elif tensor is not None and like is not None and not like.is_meta:
                    slots[name] = tensor.to(like.device)
