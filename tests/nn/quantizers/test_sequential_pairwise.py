"""Parity of `Sequential` with vector-quantize-pytorch 1.32: pairs of quantizer, place, and how it is called.

Every case trains both chains for some steps and then evaluates them: results, gradients and state, with checkpoints
handed over both ways. The quantizers' own options are held elsewhere.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from ferrovae import nn
from nn.quantizers.pairwise import Case, in_two_companies, naming
from nn.quantizers.pairwise_parity import close, step_down

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

WIDTH, DIM, LENGTH = 5, 8, 6
CODES = {"dim": DIM, "codebook_size": 16}
STAGES = {"num_quantizers": 2}
FINITE = {"levels": [5, 5, 3], "dim": DIM}
MASK = torch.arange(LENGTH) < torch.tensor([[6], [4]])
GIVEN = CODES | {"scales": (1, 2, 6), "kmeans_init": False, "threshold_ema_dead_code": 0}
# The options of each quantizer, and the arguments of a call that chains hand to it.
QUANTIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "VectorQuantize": (CODES, {"mask": MASK, "return_loss_breakdown": True}),
    "ResidualVQ": (CODES | STAGES, {"return_all_codes": True, "freeze_codebook": True}),
    "GroupedResidualVQ": (CODES | STAGES | {"groups": 2}, {"freeze_codebook": True}),
    "FSQ": (FINITE, {}),
    "FSP": (FINITE, {"eps": 0.01}),
    "LFQ": (CODES, {"inv_temperature": 2.0}),
    "SimVQ": (CODES, {}),
    "ResidualSimVQ": (CODES | STAGES, {"return_all_codes": True}),
    "ResidualLFQ": (CODES | STAGES, {"return_all_codes": True}),
    "GroupedResidualLFQ": (CODES | STAGES | {"groups": 2}, {"return_all_codes": True}),
    "ResidualFSQ": (FINITE | STAGES, {"return_all_codes": True}),
    "GroupedResidualFSQ": (FINITE | STAGES | {"groups": 2}, {"return_all_codes": True}),
    "LatentQuantize": ({"levels": [5, 4], "dim": DIM, "optimize_values": False}, {}),
    "HierarchicalVQ": (GIVEN, {"mask": MASK, "return_cutoff": True}),
    "RandomProjectionQuantizer": (CODES | {"codebook_dim": 4}, {}),
}
CHANNELS_FIRST = ("LatentQuantize", "HierarchicalVQ")
LEVELS: dict[str, tuple[str, ...]] = {
    "quantizer": tuple(QUANTIZERS),
    "place": ("in the middle", "first", "last", "alone"),
    "around": ("one layer", "two layers", "a chain of torch"),
    "call": ("plain", "with arguments"),
    "dtype": ("float32", "float64"),
    "input": ("learnt", "fixed"),
}
DIFFERENT: dict[str, list[Case]] = {
    "a single tensor as result: upstream splits it by its samples; `test_a_single_result_is_not_split`": [
        {"quantizer": "RandomProjectionQuantizer"},
    ],
}
CASES, OTHERS = in_two_companies(LEVELS, chain(*DIFFERENT.values()))
name_of = naming(LEVELS)


def make(package, case):
    """A chain of torch's layers and one quantizer of a package."""
    torch.manual_seed(5)
    name = case["quantizer"]
    plain = torch.nn.Conv1d if name in CHANNELS_FIRST else torch.nn.Linear
    kernel = (1,) if name in CHANNELS_FIRST else ()

    def around(one, two):
        if case["around"] == "one layer":
            return [plain(one, two, *kernel)]
        layers = [plain(one, DIM, *kernel), torch.nn.Tanh(), plain(DIM, two, *kernel)]
        return layers if case["around"] == "two layers" else [torch.nn.Sequential(*layers)]

    before = around(WIDTH, DIM) if case["place"] in ("in the middle", "last") else []
    after = around(DIM, WIDTH) if case["place"] in ("in the middle", "first") else []
    layers = package.Sequential(*before, getattr(package, name)(**QUANTIZERS[name][0]), *after)
    return layers.to(getattr(torch, case["dtype"]))


def tensors(result, path="result"):
    """The tensors of nested results, and what else there is, by their place."""
    if isinstance(result, dict):
        return {k: v for name, part in result.items() for k, v in tensors(part, f"{path}.{name}").items()}
    if isinstance(result, tuple | list):
        return {k: v for place, part in enumerate(result) for k, v in tensors(part, f"{path}.{place}").items()}
    return {path: result}


def run(layers, case, number):
    """Results and gradients of one step."""
    layers.zero_grad()
    width = DIM if case["place"] in ("first", "alone") else WIDTH
    x = torch.randn(2, LENGTH, width, generator=torch.Generator().manual_seed(number)).to(getattr(torch, case["dtype"]))
    x = x.mT.contiguous() if case["quantizer"] in CHANNELS_FIRST else x
    x.requires_grad_(case["input"] == "learnt")
    torch.manual_seed(7)
    results = layers(x, **(QUANTIZERS[case["quantizer"]][1] if case["call"] == "with arguments" else {}))
    assert type(results) is tuple
    found = tensors(results)
    learnt = [t for t in found.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    if layers.training and learnt:
        sum((t.double() * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in learnt).backward()
    return found, {"x": x.grad, **{name: p.grad for name, p in layers.named_parameters()}}


def check_step(case, ours, theirs, number):
    (found, gradients), (due, their_gradients) = run(ours, case, number), run(theirs, case, number)
    assert found.keys() == due.keys()
    for name, two in due.items():
        one = found[name]
        if not isinstance(two, torch.Tensor):
            assert one == two
            continue
        assert one.shape == two.shape, name
        assert one.is_floating_point() == two.is_floating_point()
        if two.is_floating_point():
            close(one, two, f"step {number}: {name}")
        else:
            assert one.dtype == two.dtype
            assert torch.equal(one, two), f"step {number}: {name}"
    assert found["result.0"].dtype == due["result.0"].dtype
    assert gradients.keys() == their_gradients.keys()
    for name in gradients:
        close(gradients[name], their_gradients[name], f"step {number}: gradient of {name}")
    for name, tensor in theirs.state_dict().items():
        close(ours.state_dict()[name], tensor, f"step {number}: state {name}")


def check(case):
    theirs, ours = make(upstream, case), make(nn, case)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for step in range(2):
        check_step(case, ours, theirs, step)
        step_down(ours, 1e-2)
        theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.eval()
    ours.eval()
    check_step(case, ours, theirs, 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case):
    check(case)


def test_a_single_result_is_not_split():
    """A quantizer whose result is one tensor: upstream takes its first sample for the result."""
    x, options = torch.randn(2, LENGTH, DIM), QUANTIZERS["RandomProjectionQuantizer"][0]
    for package, right in ((upstream, False), (nn, True)):
        quantizer = package.RandomProjectionQuantizer(**options)
        indices = quantizer(x)
        result = package.Sequential(torch.nn.Identity(), quantizer)(x)[0]
        assert (result.shape == indices.shape) == right
        assert torch.equal(result, indices if right else indices[0])


def test_every_quantizer_of_the_library_is_among_the_cases():
    kinds = {kind.__name__ for kind in upstream.utils.QUANTIZE_KLASSES}
    assert kinds == set(QUANTIZERS)


@pytest.mark.parametrize(("kind", "options"), [("BinaryMapper", {"bits": 3}), ("EvoLFQ", {"dim": 3})])
def test_quantizers_that_upstream_does_not_count(kind, options):
    """It refuses a chain around them, and takes a chain of two."""
    coders = (torch.nn.Linear(4, 3), torch.nn.Linear(3, 4)) if kind == "EvoLFQ" else ()
    for package, right in ((upstream, False), (nn, True)):
        quantizer = getattr(package, kind)(*coders, **options)
        other = package.FSQ([5, 5])
        if right:
            assert len(package.Sequential(torch.nn.Identity(), quantizer)(torch.randn(2, 4 if coders else 3))) > 1
            with pytest.raises(ValueError, match="2 of 2 layers are quantizers"):
                package.Sequential(other, quantizer)
        else:
            package.Sequential(other, quantizer)
            with pytest.raises(AssertionError, match="exactly one quantizer"):
                package.Sequential(torch.nn.Identity(), quantizer)
