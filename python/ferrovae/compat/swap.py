"""`accelerate` swaps the quantizers of other libraries in a model, `restore` swaps back, `report` says what is what."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from torch import nn

from ferrovae.compat.adapter import CannotSwapError
from ferrovae.compat.known import adapter_of, class_before, known_base
from ferrovae.compat.overlay import remove_overlay
from ferrovae.compat.rebuild import undo_rebuild

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("ferrovae")


class AccelerateWarning(UserWarning):
    """A quantizer was left as it is, or there was none to swap."""


class Swapped(NamedTuple):
    """A module that computes our way: its path ("" is the model itself), the class it had, the class it has."""

    path: str
    original: str
    replacement: str


class Left(NamedTuple):
    """A module of a known class, or derived from one, that stays as it is, and why."""

    path: str
    original: str
    reason: str


class Report(NamedTuple):
    """What `accelerate` has done to a model; `str` of it is a table."""

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        rows = [f"swapped {path or '(the model)'}: {old} -> {new}" for path, old, new in self.swapped]
        rows += [f"left {path or '(the model)'}: {old}: {reason}" for path, old, reason in self.left]
        return "\n".join(rows) if rows else "no quantizer of a known class"

    @property
    def summary(self) -> str:
        """One line."""
        return f"{len(self.swapped)} quantizers swapped, {len(self.left)} left"


class _Met(NamedTuple):
    path: str
    module: nn.Module
    original: str
    swap: Callable[[], None] | None
    reason: str


def accelerate(model: Model, *, verbose: bool = False) -> Model:
    """Let every quantizer of a known class in `model` compute with ferrovae's operations, in place; return the model.

    Known are the quantizers of transformers' EnCodec, DAC and Mimi, diffusers' `VectorQuantizer` and the classes of
    vector-quantize-pytorch (these get the class of that name in `ferrovae.nn`), each by its exact type; nothing is
    imported to recognise them. Weights, `state_dict` keys, optimizers, sharing, hooks, mode, dtype and device stay, and
    every quantizer stays the object it is. Codes become those of an exact search: the same, except where float32 could
    not tell two codes apart. `copy.deepcopy` and pickles of the model stay swapped; a second call changes nothing. Wrap
    (DistributedDataParallel, `torch.compile`) before or after; `fully_shard`, which makes subclasses, after.

    `sync_codebook=False` of a vector-quantize-pytorch layer is kept where there is a process group; before, it cannot
    be told from the default, and such a layer sums its statistics over the ranks once there are any.

    What is gained is time of the quantizers: of a model that spends most of it elsewhere, as audio codecs do in their
    convolutions, the whole takes about as long as before.

    Args:
        model: any module, also one that is a quantizer itself.
        verbose: print what `ferrovae.compat.report` says.

    Warns:
        AccelerateWarning: a quantizer is left as it is (the warning says why), or the model holds none.

    Raises:
        TypeError: model is not a module.
    """
    _check(model, "accelerate")
    # How is found out for all before any is swapped; what a swapped one holds of others' is met in the next round.
    while swaps := [met.swap for met in _walk(model) if met.swap is not None]:
        for swap in swaps:
            swap()
    found = report(model)
    _log.info("accelerate: %s", found.summary)
    if verbose:
        print(found)
    if found.left or not found.swapped:
        reasons = Report((), found.left)
        warnings.warn(f"accelerate: {found.summary}\n{reasons}", AccelerateWarning, stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` in place; return the model, every module of it again of the class it had.

    Warns:
        AccelerateWarning: a module has got yet another class since (`fully_shard`), and stays.

    Raises:
        TypeError: model is not a module.
    """
    _check(model, "restore")
    for path, module in list(model.named_modules()):
        try:
            remove_overlay(module)
            undo_rebuild(module)
        except CannotSwapError as why:
            warnings.warn(f"restore: {path or 'the model'} stays swapped: {why}", AccelerateWarning, stacklevel=2)
    return model


def report(model: nn.Module) -> Report:
    """What in `model` is swapped, and what is left and why. Read from the model as it is, so also true of a copy.

    Raises:
        TypeError: model is not a module.
    """
    _check(model, "report")
    swapped, left = [], []
    for path, module, original, swap, reason in _walk(model):
        if reason or swap is not None:
            left.append(Left(path, original, reason or "not swapped yet: call accelerate"))
        else:
            swapped.append(Swapped(path, original, _name(type(module))))
    return Report(tuple(swapped), tuple(left))


def _walk(model: nn.Module) -> Iterator[_Met]:
    """Every module that is, or is derived from, a known class, once, outermost first."""
    seen: set[nn.Module] = set()

    def visit(path: str, module: nn.Module, within: str) -> Iterator[_Met]:
        if module in seen:
            return
        seen.add(module)
        met, within, inside = _meet(path, module, within)
        if met is not None:
            yield met
        if not inside:
            return
        for name, child in module.named_children():
            yield from visit(f"{path}.{name}" if path else name, child, within)

    yield from visit("", model, "")


def _meet(path: str, module: nn.Module, within: str) -> tuple[_Met | None, str, bool]:
    """What there is to say of a module, the container that is left and holds its children, whether to look inside."""
    kind = type(module)
    before = class_before(module)
    if before is not None:
        return _Met(path, module, _name(before), None, ""), within, True
    base = known_base(kind) if adapter_of(kind) is None else None
    adapter = adapter_of(kind if base is None else base)
    if adapter is None:
        return None, within, True
    if within:
        return _Met(path, module, _name(kind), None, f"part of {within}, which is left"), within, True
    if base is not None:
        reason = f"a subclass of {base.__name__}, which may compute something else"
    else:
        try:
            return _Met(path, module, _name(kind), adapter.prepare(module), ""), "", not adapter.whole
        except CannotSwapError as why:
            reason = str(why)
    return _Met(path, module, _name(kind), None, reason), (path or kind.__name__) if adapter.whole else "", True


def _name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: model is a {type(model).__name__}, expected a torch.nn.Module (of a pipeline, its `vae`)"
        )
