"""Parity of `SimVQ` with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, losses, gradients, state, and
codes of indices, with checkpoints handed over both ways. Rows lie near codes, so that rounding decides no index.
A map that looks at more than one code decodes here from the codes of all, where the library gives it the chosen ones
alone, or raises: the outputs say what is right, as does
`test_sim_vq.test_a_map_that_looks_at_all_codes_sees_all_of_them`.
bfloat16 layers are not compared, whose distances, codes and losses the library rounds: `test_sim_vq.test_precision`.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from ferrovae.nn import SimVQ
from nn.quantizers.pairwise import Case, in_two_companies, naming
from nn.quantizers.sim_vq_cases import DIM, OPTIONS, moments_kept

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

BATCH = 3
GRIDS = {"sequence": (12,), "image": (3, 4), "video": (2, 2, 3), "rows": ()}
CALLS = {"layout": tuple(GRIDS), "dtype": ("float32", "float64"), "input": ("learnt", "fixed")}
REFUSED: list[Case] = [{"codes": "1", "map": "of all codes"}]  # one code has no variance
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
name_of = naming(LEVELS)
CASES, OTHERS = in_two_companies(LEVELS, REFUSED)


def make(kind, case):
    options: dict[str, Any] = {"dim": DIM}
    for factor, levels in OPTIONS.items():
        options |= levels[case[factor]]
    torch.manual_seed(5)
    if "codebook_transform" in options:
        options["codebook_transform"] = options["codebook_transform"](options.get("frozen_codebook_dim", DIM))
    return kind(**options).to(getattr(torch, case["dtype"]))


def batch(case, layer, number):
    """Rows (B ..., D) laid out as the case has it, each near one of the codes."""
    generator = torch.Generator().manual_seed(number)
    training = layer.training
    with torch.no_grad():
        codes = (
            layer.eval().codebook
            if case["map"] != "of all codes" or not training
            else moments_kept(layer, lambda: layer.train().codebook)
        )
    layer.train(training)
    grid = GRIDS[case["layout"]]
    chosen = torch.randint(len(codes), (BATCH, *grid), generator=generator)
    x = codes[chosen] + 0.05 * torch.randn(BATCH, *grid, DIM, generator=generator)
    return (x.movedim(-1, 1) if case["channels"] == "first" else x).detach()


def run(layer, x, learnt):
    """Results and gradients of one step."""
    layer.zero_grad()
    x = x.clone().requires_grad_(learnt)
    quantized, indices, loss = layer(x)
    direction = torch.linspace(-1, 1, quantized.numel(), dtype=x.dtype).view_as(quantized)
    total = (quantized * direction).sum() + 10 * loss
    if total.requires_grad:
        total.backward()
    return quantized, indices, loss, {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def assert_same(found, due, what):
    for one, two in zip(found[:3], due[:3], strict=True):
        assert one.shape == two.shape
        assert one.dtype == two.dtype
    assert torch.equal(found[1], due[1]), f"{what}: {int((found[1] != due[1]).sum())} indices differ"
    torch.testing.assert_close(found[::2], due[::2], rtol=1e-4, atol=1e-5, msg=lambda m: f"{what}: {m}")
    assert found[3].keys() == due[3].keys()
    for name in found[3]:
        # A gradient that is missing is one of zeros.
        one, two = (torch.zeros((), dtype=found[0].dtype) if g is None else g for g in (found[3][name], due[3][name]))
        one, two = torch.broadcast_tensors(one, two)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{what} gradient of {n}: {m}")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case):
    check(case)


def check(case):
    theirs, ours = make(upstream.SimVQ, case), make(SimVQ, case)
    with torch.no_grad():
        for tensor in ours.state_dict().values():  # what is loaded is seen to be
            if tensor.is_floating_point():
                tensor.fill_(1.0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    learnt = case["input"] == "learnt"
    for step in range(3):
        x = batch(case, theirs, step)
        found = run(ours, x, learnt)
        assert_same(found, run(theirs, x, learnt), f"step {step}")
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if found[3][name] is not None:
                    parameter -= 1e-2 * found[3][name]
        if case["map"] == "of all codes":  # its moments are state
            torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
        theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.eval()
    ours.eval()
    x = batch(case, theirs, 3)
    found = run(ours, x, learnt)
    assert_same(found, run(theirs, x, learnt), "eval")
    torch.testing.assert_close(ours.codebook, theirs.codebook)
    codes = ours.indices_to_codes(found[1])
    due = found[0] if case["map"] == "of all codes" else theirs.indices_to_codes(found[1])
    torch.testing.assert_close(codes, due, rtol=1e-4, atol=1e-5)
    assert codes.shape == x.shape
