"""The constructor's arguments are recovered from a module: another one made with them is the same in every option.

"The same" is what `Rebuild` itself demands, and for single classes also that outputs and losses are equal with the same
weights.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compat.upstream_cases import CASES, fitting, made, runs
from ferrovae.compat.adapter import CannotSwapError
from ferrovae.compat.rebuild import _defaults, _make
from ferrovae.compat.sameness import check_same
from ferrovae.compat.vector_quantize_pytorch._adapters import ADAPTERS
from ferrovae.compat.vector_quantize_pytorch._arguments import ARGUMENTS
from ferrovae.compat.vector_quantize_pytorch._names import SUBMODULES

upstream = pytest.importorskip("vector_quantize_pytorch")


def again(module: nn.Module) -> nn.Module:
    return _make(type(module), ARGUMENTS[type(module).__name__](module), _defaults(module))


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_made_again_it_is_the_same(name: str, options: dict[str, Any]) -> None:
    module = made(name, options)
    check_same(module, again(module))
    # And what was asked for came back, where it can be compared and made a difference.
    recovered = ARGUMENTS[name](module)
    for option, value in options.items():
        if isinstance(value, bool | float) and option in recovered and not option.startswith(("kmeans", "share")):
            assert recovered[option] == pytest.approx(value), option


def test_every_class_is_known_and_tried() -> None:
    assert {name for name, _ in CASES} | {"Sequential"} == set(SUBMODULES)
    assert {(type_.__module__, type_.__qualname__) for type_ in (getattr(upstream, n) for n in SUBMODULES)} == set(
        ADAPTERS
    )


TRAINED = [
    (name, options)
    for name, options in CASES
    if name in ("VectorQuantize", "ResidualVQ", "LFQ", "FSQ", "SimVQ")
    and runs(name, options)
    and "in_place_codebook_optimizer" not in options
]


@pytest.mark.parametrize(("name", "options"), TRAINED, ids=lambda value: value if isinstance(value, str) else "")
def test_made_again_it_computes_the_same(name: str, options: dict[str, Any]) -> None:
    module = made(name, options)
    x = fitting(name, options)
    torch.manual_seed(1)
    module(x)
    other = again(module)
    other.load_state_dict(module.state_dict(), strict=not options.get("affine_param", False))
    module = copy.deepcopy(module)
    outputs = []
    for layer in (module, other):
        torch.manual_seed(2)
        outputs.append(layer(x.clone().requires_grad_()))
    for a, b in zip(*outputs, strict=True):
        if a is not None and not options.get("affine_param", False):
            torch.testing.assert_close(a, b)


def test_what_was_changed_afterwards_is_not_hidden() -> None:
    module = upstream.LFQ(codebook_size=16)
    module.codebook_dim = 3
    with pytest.raises(CannotSwapError, match="codebook_dim is 3, where its constructor's arguments would make it 4"):
        check_same(module, again(module))
