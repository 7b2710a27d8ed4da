"""What a rebuilt module keeps, over all classes of vector-quantize-pytorch.

The layer that takes a module's place is a subclass of the module's own class, which computes the same by definition: so
what differs before and after would be the swap's doing.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compat.upstream_cases import CASES, fitting, made, runs
from ferrovae.compat.adapter import CannotSwapError
from ferrovae.compat.rebuild import Rebuild, original_class, undo_rebuild
from ferrovae.compat.vector_quantize_pytorch._arguments import ARGUMENTS

pytest.importorskip("vector_quantize_pytorch")


def adapter(module: nn.Module) -> Rebuild:
    kind = type(module)
    ours = type(f"Our{kind.__name__}", (kind,), {"__module__": __name__})
    return Rebuild(lambda: ours, ARGUMENTS[kind.__name__])


def outcome(layer: nn.Module, x: torch.Tensor) -> list[Any]:
    torch.manual_seed(5)
    result = layer(x.clone().requires_grad_())
    values = result if isinstance(result, tuple) else (result,)
    return [value for value in values if isinstance(value, torch.Tensor)]


# Affine layers get tensors in their first batch that a new one of upstream does not load.
RUNS = [(name, options) for name, options in CASES if runs(name, options) and "affine_param" not in options]


@pytest.mark.parametrize(("name", "options"), RUNS, ids=lambda value: value if isinstance(value, str) else "")
def test_swapped_and_restored_it_goes_on_as_it_would_have(name: str, options: dict[str, Any]) -> None:
    module, x = made(name, options), fitting(name, options)
    outcome(module, x)
    theirs, kind = copy.deepcopy(module), type(module)
    parts = {path: id(part) for path, part in module.named_modules()}
    tensors = {key: id(t) for key, t in [*module.named_parameters(), *module.named_buffers()]}
    attributes = set(vars(module))
    state = torch.get_rng_state()
    adapter(module).prepare(module)()
    assert torch.equal(torch.get_rng_state(), state)
    assert original_class(module) is kind
    assert type(module).__name__ == f"Our{kind.__name__}"
    assert {key: id(t) for key, t in [*module.named_parameters(), *module.named_buffers()]} == tensors
    assert list(module.state_dict()) == list(theirs.state_dict())
    for _ in range(2):
        for a, b in zip(outcome(module, x), outcome(theirs, x), strict=True):
            torch.testing.assert_close(a, b)
    undo_rebuild(module)
    assert type(module) is kind
    assert {path: id(part) for path, part in module.named_modules()} == parts
    assert set(vars(module)) == attributes
    for a, b in zip(module.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(outcome(module, x), outcome(theirs, x), strict=True):
        torch.testing.assert_close(a, b)


def vq() -> nn.Module:
    return made("VectorQuantize", {"dim": 8, "codebook_size": 16, "codebook_dim": 4})


def test_hooks_and_modes_inside_are_kept_and_handles_still_remove() -> None:
    module, calls = vq(), []
    handle = module.project_in.register_forward_hook(lambda *_: calls.append("in"))
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.project_out.eval()
    adapter(module).prepare(module)()
    module(torch.randn(1, 5, 8))
    assert calls == ["pre", "in"]
    assert (module.training, module.project_in.training, module.project_out.training) == (True, True, False)
    handle.remove()
    later = module.project_out.register_forward_hook(lambda *_: calls.append("out"))
    module(torch.randn(1, 5, 8))
    assert calls == ["pre", "in", "pre", "out"]
    undo_rebuild(module)
    module(torch.randn(1, 5, 8))
    assert calls[4:] == ["pre", "out"]
    later.remove()
    module(torch.randn(1, 5, 8))
    assert calls[6:] == ["pre"]


def test_hooks_that_belong_to_our_layer_know_the_module() -> None:
    module = vq()
    kind, met = type(module), []

    class Ours(kind):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_load_state_dict_pre_hook(lambda layer, *_: met.append(layer))

    Rebuild(lambda: Ours, ARGUMENTS["VectorQuantize"]).prepare(module)()
    met.clear()
    module.load_state_dict(module.state_dict())
    assert met == [module]


def test_a_copy_is_restored_with_its_own_tensors() -> None:
    module = vq()
    adapter(module).prepare(module)()
    other = copy.deepcopy(module)
    with torch.no_grad():
        other._codebook.embed.add_(1.0)
    undo_rebuild(other)
    undo_rebuild(module)
    assert torch.equal(other._codebook.embed, module._codebook.embed + 1.0)


def test_what_was_moved_since_is_restored_where_it_is_now() -> None:
    module = made("LFQ", {"dim": 8, "codebook_size": 16})
    adapter(module).prepare(module)()
    module.double().eval()
    undo_rebuild(module)
    assert not module.training
    assert not module.project_in.training
    assert module.project_in.weight.dtype == torch.float64
    module(torch.randn(1, 5, 8, dtype=torch.float64))


def test_attributes_of_others_stay() -> None:
    module = vq()
    module.note = "mine"
    adapter(module).prepare(module)()
    assert module.note == "mine"
    module.later = "also mine"
    module.freeze_codebook = True
    undo_rebuild(module)
    assert (module.note, module.later, module.freeze_codebook) == ("mine", "also mine", True)


def test_a_replaced_method_is_not_hidden() -> None:
    module = vq()
    module.forward = lambda x: x
    with pytest.raises(CannotSwapError, match="forward was replaced on this one object"):
        adapter(module).prepare(module)


def test_an_exchanged_part_is_not_hidden() -> None:
    module = vq()
    module.project_in = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
    with pytest.raises(CannotSwapError):
        adapter(module).prepare(module)


def test_hooks_where_ours_has_no_part_are_not_lost() -> None:
    module = vq()
    kind = type(module)

    class Ours(kind):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            del self.project_out

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            for key in ("project_out.weight", "project_out.bias"):
                state_dict.pop(prefix + key)
            super()._load_from_state_dict(state_dict, prefix, *args)

    module.project_out.register_forward_hook(lambda *_: None)
    with pytest.raises(CannotSwapError, match="project_out has hooks"):
        Rebuild(lambda: Ours, ARGUMENTS["VectorQuantize"]).prepare(module)


def test_an_optimizer_of_the_codebook_keeps_its_moments() -> None:
    options = {"dim": 8, "codebook_size": 16, "learnable_codebook": True, "ema_update": False}
    module = made("VectorQuantize", {**options, "in_place_codebook_optimizer": lambda p: torch.optim.Adam(p, lr=0.1)})
    module(torch.randn(1, 30, 8))
    optimizer = module.in_place_codebook_optimizer
    adapter(module).prepare(module)()
    assert module.in_place_codebook_optimizer is optimizer
    assert module._codebook.embed is optimizer.param_groups[0]["params"][0]
    assert optimizer.state[module._codebook.embed]["step"] == 1
