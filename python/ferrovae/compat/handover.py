"""Handing tensors, modes and hooks from one module to another, by path: the objects themselves, not copies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ferrovae.compat.adapter import CannotSwapError

HOOKS = (
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


def own_tensors(part: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module itself, by name."""
    both = [*part._parameters.items(), *part._buffers.items()]
    return {name: tensor for name, tensor in both if tensor is not None}


def _saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state by key, without the hooks that may rename it."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, part in module.named_modules(remove_duplicate=False)
        for name, tensor in own_tensors(part).items()
        if name not in part._non_persistent_buffers_set
    }


def take_tensors(ours: nn.Module, module: nn.Module) -> None:
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
        for name, tensor in own_tensors(part).items():
            found = own_tensors(theirs).get(name)
            fits = found is not None and (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
            if isinstance(tensor, nn.Parameter) and not (fits and isinstance(found, nn.Parameter)):
                raise CannotSwapError(
                    f"{path}.{name} is no parameter of shape {tuple(tensor.shape)} and {tensor.dtype}"
                )
            if fits:
                (part._parameters if name in part._parameters else part._buffers)[name] = found


def take_hooks(ours: nn.Module, module: nn.Module) -> None:
    """Modes and hooks, by path; hooks in the very dictionaries, so that their handles still remove them."""
    parts = dict(ours.named_modules())
    ours.train(module.training)
    for path, theirs in module.named_modules():
        part = parts.get(path)
        if part is theirs:
            continue
        hooked = [name for name in HOOKS if getattr(theirs, name)]
        if part is None:
            if hooked:
                raise CannotSwapError(f"{path} has hooks, and {type(ours).__name__} has no such part")
            continue
        part.training = theirs.training
        part._is_full_backward_hook = theirs._is_full_backward_hook
        for name in HOOKS:
            own = getattr(part, name)
            setattr(part, name, {**getattr(theirs, name), **own} if own else getattr(theirs, name))


def give_back(old: nn.Module, module: nn.Module) -> None:
    """The tensors and modes of the module, and what they are on, go back into the parts it had."""
    parts = dict(module.named_modules(remove_duplicate=False))
    like = next(iter(_saved_tensors(module).values()), None)
    for path, part in old.named_modules(remove_duplicate=False):
        now = parts.get(path)
        part.training = module.training if now is None else now.training
        if now is part:
            continue
        tensors = {} if now is None else own_tensors(now)
        for slots in (part._parameters, part._buffers):
            for name, tensor in slots.items():
                found = tensors.get(name)
                if found is not None and tensor is not None:
                    same = found.dtype == tensor.dtype or isinstance(found, nn.Parameter)
                    slots[name] = found if same else found.to(tensor.dtype)
                elif tensor is not None and like is not None and not like.is_meta:
                    slots[name] = tensor.to(like.device)
