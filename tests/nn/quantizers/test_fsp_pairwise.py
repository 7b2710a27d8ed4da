"""Parity of `FSP` with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, bins, the penalty and the
moments, gradients, state, codes of indices, methods and attributes, with checkpoints handed over both ways. Both draw
the same perturbations. Rows lie so that rounding decides no bin, and not so near the ends of [0, 1] that an inverse
would leave nothing but rounding. Where the library raises or is wrong it is asked in another way:
- in half precision, of which it rounds bins and moments, or raises, between the projections as a float32 layer;
- codes of indices by a layer that is not float32, as a float32 layer.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import chain
from typing import Any

import pytest
import torch

from ferrovae.nn import FSP
from ferrovae.nn.quantizers import fsp
from nn.quantizers.pairwise import in_two_companies, naming, options_at
from nn.quantizers.pairwise_draws import shared_draws
from nn.quantizers.pairwise_parity import assert_results, backward, close, dtype_of, loaded, step_down

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
module = pytest.importorskip("vector_quantize_pytorch.finite_scalar_perturbation")

BATCH, GRIDS = 3, {"sequence": (12,), "image": (3, 4), "video": (2, 2, 3), "rows": ()}
# How far from an end of its bin a number stays, in bins.
MARGIN = {"float32": 1e-3, "float64": 1e-4, "bfloat16": 0.1, "autocast": 0.1}

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "levels": {
        "8 5 4": {"levels": [8, 5, 4]},
        "odd": {"levels": (5, 3)},
        "many": {"levels": [15]},
        "one and two": {"levels": [1, 2, 6]},
    },
    "dim": {"of the codes": {}, "given": {"dim": 7}},
    "channels": {"last": {}, "first": {"channel_first": True}},
    "bias": {"yes": {}, "no": {"projection_has_bias": False}},
    "distribution": {
        "tanh": {},
        "sigmoid": {"act_name": "sigmoid"},
        "normal": {"act_name": "normal"},
        "laplace": {"act_name": "laplace"},
        "cauchy": {"act_name": "cauchy"},
    },
    "rate": {
        "none": {},
        "half": {"quantize_rate": 0.5},
        "fifth": {"quantize_rate": 0.2},
        "all": {"quantize_rate": 1.0},
    },
    "inverse": {"no": {}, "yes": {"need_inv_act": True}},
    "norm": {
        "var_tanh": {},
        "none": {"vector_norm": "none"},
        "var": {"vector_norm": "var"},
        "kurt": {"vector_norm": "kurt"},
        "var_sigmoid": {"vector_norm": "var_sigmoid"},
        "var_laplace": {"vector_norm": "var_laplace"},
    },
}
CALLS = {
    "layout": ("sequence", "image", "video", "rows"),
    "dtype": ("float32", "float64", "bfloat16", "autocast"),
    "eps": ("default", "0.01", "0"),
    "input": ("learnt", "fixed"),
}
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
CASES, OTHERS = in_two_companies(LEVELS)
name_of = naming(LEVELS)
ATTRIBUTES = (
    "_levels",
    "_basis",
    "codebook_dim",
    "codebook_size",
    "dim",
    "channel_first",
    "has_projections",
    "act_name",
)
ATTRIBUTES += ("need_inv_act", "quantize_rate")
WEIGHTS = ("l1_weight", "l2_weight", "l3_weight", "l4_weight", "eps")


@pytest.fixture
def draws(monkeypatch):
    return shared_draws(monkeypatch, module, fsp)


def options_of(case):
    return options_at(case, OPTIONS)


def clear_tokens(case, layer, number):
    """Tokens (B N, dim) of which a rounding decides no bin."""
    generator = torch.Generator().manual_seed(100 + number)
    rows = BATCH * 12
    tokens = 1.5 * torch.randn(400 * rows, layer.dim, generator=generator)
    exact = copy.deepcopy(layer.project_in).double()
    with torch.no_grad():
        value = layer.act_func(exact(tokens.double()))
        place = value * layer._levels
        near = ((place - place.round()).abs() < MARGIN[case["dtype"]]) | ((value - 0.5).abs() > 0.48)
    kept = tokens[~near.any(-1)][:rows]
    assert len(kept) == rows
    return kept.to(dtype_of(case))


def laid_out(case, tokens):
    x = tokens.view(-1, *GRIDS[case["layout"]], tokens.shape[-1])
    return x.movedim(-1, 1) if case["channels"] == "first" else x


def run(ask, case, layer, tokens, draws, seed):
    """Results and gradients of one step."""
    layer.zero_grad()
    draws.restart(seed)
    tokens = tokens.clone().requires_grad_(case["input"] == "learnt")
    arguments = {} if case["eps"] == "default" else {"eps": float(case["eps"])}
    with torch.autocast("cpu", torch.bfloat16) if case["dtype"] == "autocast" else nullcontext():
        quantized, indices, penalty, info = ask(laid_out(case, tokens), **arguments)
    backward(quantized, penalty)
    results = {"quantized": quantized, "indices": indices, "penalty": penalty, "gradient of x": tokens.grad}
    info = dict(info)
    results |= {f"moment {name}": moment for name, moment in info.pop("norm_info").items()} | info
    return results | {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}


def theirs(case, peer):
    """The library's layer, or what it gives as a float32 layer between projections of half precision."""
    if case["dtype"] in ("float32", "float64"):
        return peer
    inner = {name: value for name, value in options_of(case).items() if name not in ("dim", "channel_first")}
    core = upstream.FSP(**inner).train(peer.training)
    last = 1 if peer.channel_first else -1

    def ask(z, eps=None):
        projected = peer.project_in(z.movedim(last, -1))
        with torch.autocast("cpu", enabled=False):
            quantized, *rest = core(projected.float(), eps)
        return (peer.project_out(quantized.to(projected.dtype)).movedim(-1, last), *rest)

    return ask


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case, draws):
    check(case, draws)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case, draws):
    check(case, draws)


def check(case, draws):
    rough, dtype = case["dtype"] in ("bfloat16", "autocast"), dtype_of(case)
    torch.manual_seed(5)
    peer = upstream.FSP(**options_of(case)).to(dtype)
    layer = loaded(FSP(**options_of(case)).to(dtype), peer)
    for step in range(3):
        training = step < 2
        peer.train(training)
        layer.train(training)
        tokens = clear_tokens(case, peer, step)
        found = run(layer, case, layer, tokens, draws, step)
        due = run(theirs(case, peer), case, peer, tokens, draws, step)
        if not rough:  # each element by itself, as an inverse may make some of them large
            torch.testing.assert_close(found["quantized"], due["quantized"], rtol=2e-3, atol=2e-4)
        assert_results(found, due, f"step {step}", rough)
        if training:
            step_down(layer, 1e-2)
            peer.load_state_dict(layer.state_dict(), strict=True)
    assert_decoding(case, layer, peer, found, rough)
    assert_methods(layer, peer)


@torch.no_grad()
def assert_decoding(case, layer, peer, found, rough):
    single, indices = copy.deepcopy(peer).float(), found["indices"]
    for eps in ({}, {"eps": 0.2}):
        codes, due = (of.indices_to_codes(indices, **eps) for of in (layer, single))
        assert codes.shape == due.shape
        assert codes.dtype == getattr(layer.project_out, "weight", due).dtype
        close(codes, due, "codes of indices", rough)
    if case["eps"] == "default":
        close(layer.indices_to_codes(indices), found["quantized"], "what they decode to", rough)


@torch.no_grad()
def assert_methods(layer, peer):
    for name in ATTRIBUTES:
        one, two = getattr(layer, name), getattr(peer, name)
        assert torch.equal(one, two) if isinstance(two, torch.Tensor) else one == two, name
    assert all(getattr(layer.vector_norm, name) == getattr(peer.vector_norm, name) for name in WEIGHTS)
    value = 0.02 + 0.96 * torch.rand(3, 20, layer.codebook_dim)
    for found, due in zip(layer.quantize_act_value(value, 0.1), peer.quantize_act_value(value, 0.1), strict=True):
        close(found, due, "quantized values")
    bins = layer.quantize_act_value(value, 1e-6)[1]
    indices = layer.level_indices_to_indices(bins)
    assert torch.equal(indices, peer.level_indices_to_indices(bins))
    for given in (indices, indices.long()):
        one, two = layer.indices_to_level_indices(given), peer.indices_to_level_indices(given)
        assert torch.equal(one, two)
        assert one.dtype == two.dtype
    close(layer.indices_to_act_value(indices), peer.indices_to_act_value(indices), "middles of bins")
    z = torch.randn(50)
    close(layer.act_func(z), peer.act_func(z), "distribution")
    torch.testing.assert_close(layer.inv_act_func(value), peer.inv_act_func(value), rtol=1e-4, atol=1e-5)
