"""Parity of `LatentQuantize` with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, losses, gradients, state, codes
of indices, methods and attributes, with checkpoints handed over both ways. Rows lie so that rounding decides no index.
Where the library raises or is wrong the right value comes from it in another way:
- indices, which it finds by evenly spread values and truncates: the places of its codes among the values;
- codes of indices, once the values have moved: the values at those places, projected;
- gradients of the values, which it makes parameters that no loss reaches: of its commitment loss to those values;
- a weight of None: 0;
- steps in place, at which it raises: a layer with the values as they are after ours took its step, which
  `test_latent_quantize.test_a_step_in_place_is_gradient_descent_before_the_batch_is_quantized` has;
- the dtype of a bfloat16 layer's loss: float32;
- values that are not learnt, which it leaves behind when the layer becomes another dtype: they are taken along.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch

from ferrovae.nn import LatentQuantize
from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at
from nn.quantizers.pairwise_parity import assert_results, backward, close, dtype_of, loaded, step_down

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

BATCH, GRIDS = 3, {"sequence": (12,), "image": (3, 4), "video": (2, 2, 3), "rows": ()}
# How far from the middle between two values a number stays.
MARGIN = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 0.02, "autocast": 0.02}
SGD, ADAM = partial(torch.optim.SGD, lr=0.5), partial(torch.optim.Adam, lr=0.02)

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "levels": {
        "5 4 8": {"levels": [5, 4, 8]},
        "one number": {"levels": 6, "codebook_dim": 2},
        "counted": {"levels": (5, 7), "codebook_dim": 2},
        "one": {"levels": [9], "codebook_dim": 0},
        "two": {"levels": [2, 3, 2]},
    },
    "dim": {"of the codes": {}, "given": {"dim": 7}},
    "commitment": {
        "tenth": {},
        "zero": {"commitment_loss_weight": 0.0},
        "none": {"commitment_loss_weight": None},
        "more": {"commitment_loss_weight": 0.7},
    },
    "quantization": {
        "tenth": {},
        "zero": {"quantization_loss_weight": 0.0},
        "none": {"quantization_loss_weight": None},
        "more": {"quantization_loss_weight": 1.3},
    },
    "books": {
        "one": {},
        "kept": {"keep_num_codebooks_dim": True},
        "not kept": {"keep_num_codebooks_dim": False},
        "two": {"num_codebooks": 2},
        "three, not to be kept": {"num_codebooks": 3, "keep_num_codebooks_dim": False},
    },
    "values": {"learnt": {}, "fixed": {"optimize_values": False}, "none": {"optimize_values": None}},
    "in place": {
        "no": {},
        "sgd": {"in_place_codebook_optimizer": SGD},
        "adam": {"in_place_codebook_optimizer": ADAM},
    },
}
CALLS = {
    "start": ("even", "moved"),
    "layout": ("sequence", "image", "video", "rows"),
    "dtype": ("float32", "float64", "bfloat16", "autocast"),
    "input": ("learnt", "fixed"),
}
# Nothing can be optimized.
REFUSED: list[Case] = [
    {"values": values, "in place": optimizer} for values in ("fixed", "none") for optimizer in ("sgd", "adam")
]
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
CASES, OTHERS = in_two_companies(LEVELS, REFUSED)
name_of = naming(LEVELS)
ATTRIBUTES = ("codebook_dim", "effective_codebook_dim", "num_codebooks", "keep_num_codebooks_dim", "dim")
ATTRIBUTES += ("has_projections", "codebook_size", "commitment_loss_weight", "quantization_loss_weight", "_levels")


def options_of(case):
    options = options_at(case, OPTIONS)
    channels = options["codebook_dim"] if isinstance(options["levels"], int) else len(options["levels"])
    return {"dim": channels * options.get("num_codebooks", 1)} | options


def pair(case):
    dtype, options = dtype_of(case), options_of(case)
    asked = {name: 0.0 if value is None and "weight" in name else value for name, value in options.items()}
    asked.pop("in_place_codebook_optimizer", None)
    torch.manual_seed(5)
    peer, layer = upstream.LatentQuantize(**asked), LatentQuantize(**options)
    for one, two in zip(layer.values_per_latent, peer.values_per_latent, strict=True):
        torch.testing.assert_close(one, two)
    if case["start"] == "moved":
        for values in peer.values_per_latent:
            values.data.mul_(1.7).add_(0.2 * torch.randn(len(values)))
    layer = layer.to(dtype)
    if case["values"] != "learnt":  # no state, and upstream's do not follow the layer
        for one, two in zip(layer.values_per_latent, peer.values_per_latent, strict=True):
            two.data = two.to(dtype)
            one.data.copy_(two)
    return peer.to(dtype), loaded(layer, peer.to(dtype))


def context(case):
    return torch.autocast("cpu", torch.bfloat16) if case["dtype"] == "autocast" else nullcontext()


def clear_tokens(case, layer, number):
    """Tokens (B N, dim) of which a rounding decides no code."""
    generator = torch.Generator().manual_seed(100 + number)
    rows = BATCH * 12
    tokens = 0.6 * torch.randn(400 * rows, layer.dim, generator=generator)
    exact = copy.deepcopy(layer.project_in).double()
    with torch.no_grad():
        z = exact(tokens.double()).unflatten(-1, (layer.num_codebooks, -1))
        tight = torch.zeros(len(tokens), dtype=torch.bool)
        for channel, values in zip(z.unbind(-1), layer.values_per_latent, strict=True):
            near = (channel[..., None] - values.double()).abs().topk(2, largest=False).values
            tight |= (near[..., 1] - near[..., 0] < 2 * MARGIN[case["dtype"]]).any(-1)
    kept = tokens[~tight][:rows]
    assert len(kept) == rows
    return kept.to(dtype_of(case))


def laid_out(case, tokens):
    return tokens.view(-1, *GRIDS[case["layout"]], tokens.shape[-1]).movedim(-1, 1)


def places(peer, z):
    """The places of the library's codes of z (..., dim) among its values, (..., c, d)."""
    with torch.no_grad():
        codes = peer.quantize(peer.project_in(z).unflatten(-1, (peer.num_codebooks, -1))).unbind(-1)
        pairs = zip(codes, peer.values_per_latent, strict=True)
        return torch.stack([(code[..., None] - values).abs().argmin(-1) for code, values in pairs], -1)


def indices_at(peer, digits):
    indices = (digits * peer._basis).sum(-1).int()
    return indices if peer.keep_num_codebooks_dim else indices.squeeze(-1)


def values_at(peer, digits):
    """(..., c, d) -> (..., c d)."""
    pairs = zip(digits.unbind(-1), peer.values_per_latent, strict=True)
    return torch.stack([values[place] for place, values in pairs], -1).flatten(-2)


def ours(case, layer, tokens):
    with context(case):
        return layer(laid_out(case, tokens))


def theirs(case, peer, tokens):
    x = laid_out(case, tokens)
    with context(case):
        quantized, _, loss = peer(x)
        digits = places(peer, x.movedim(1, -1))
        # What trains the values, of which only the gradient is wanted.
        if peer.training and case["values"] == "learnt" and case["in place"] == "no":
            codes = values_at(peer, digits)
            frozen = torch.func.functional_call(
                peer.project_out, {n: p.detach() for n, p in peer.project_out.named_parameters()}, (codes,)
            )
            reach = peer.commitment_loss_weight * peer.commitment_loss(x, frozen.movedim(-1, 1))
            loss = loss + (reach - reach.detach())
    loss = loss.float() if case["dtype"] == "bfloat16" else loss
    return quantized, indices_at(peer, digits), loss


def run(ask, case, layer, tokens):
    """Results and gradients of one step."""
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_(case["input"] == "learnt")
    quantized, indices, loss = ask(case, layer, tokens)
    backward(quantized, loss)
    results = {"quantized": quantized, "indices": indices, "loss": loss, "gradient of x": tokens.grad}
    return results | {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case):
    check(case)


def check(case):
    rough = case["dtype"] in ("bfloat16", "autocast")
    peer, layer = pair(case)
    for step in range(3):
        training = step < 2
        peer.train(training)
        layer.train(training)
        tokens = clear_tokens(case, peer, step)
        before = [values.detach().clone() for values in layer.values_per_latent]
        found = run(ours, case, layer, tokens)
        moved = any(not torch.equal(one, two) for one, two in zip(before, layer.values_per_latent, strict=True))
        assert moved == (training and case["in place"] != "no")
        if moved:
            peer.load_state_dict(layer.state_dict(), strict=True)
        assert_results(found, run(theirs, case, peer, tokens), f"step {step}", rough)
        if training:
            step_down(layer, 1e-2)
            peer.load_state_dict(layer.state_dict(), strict=True)
    assert_decoding(case, layer, peer, tokens, found)
    assert_methods(layer, peer, tokens[:24], rough)


@torch.no_grad()
def assert_decoding(case, layer, peer, tokens, found):
    rough = case["dtype"] == "bfloat16"
    digits = places(peer, laid_out(case, tokens).movedim(1, -1))
    codes = values_at(peer, digits)
    for project_out, due in ((True, peer.project_out(codes)), (False, codes)):
        one = layer.indices_to_codes(found["indices"], project_out)
        assert_results({"codes": one}, {"codes": due.movedim(-1, 1)}, "of indices", rough)
    assert torch.equal(layer.indices_to_codes(found["indices"].long()), layer.indices_to_codes(found["indices"]))
    if case["start"] == "even" and (case["values"] != "learnt"):  # or they have moved
        single = copy.deepcopy(peer).float()
        for project_out in (True, False):
            one, two = (of.indices_to_codes(found["indices"], project_out=project_out) for of in (layer, single))
            assert one.shape == two.shape
            close(one, two, "codes of indices", rough)
        close(layer.implicit_codebook, peer.implicit_codebook, "implicit codebook", rough)


@torch.no_grad()
def assert_methods(layer, peer, tokens, rough):
    for name in ATTRIBUTES:
        one, two = getattr(layer, name), getattr(peer, name)
        assert torch.equal(one, two) if isinstance(two, torch.Tensor) else one == two, name
    assert len(layer.values_per_latent) == len(peer.values_per_latent)
    z = layer.project_in(tokens).unflatten(-1, (layer.num_codebooks, -1)).unflatten(0, (2, 12))
    codes = layer.quantize(z)
    assert_results({"codes": codes}, {"codes": peer.quantize(z)}, "quantize", rough)
    for reduce in ("mean", "none", "sum"):
        for name in ("quantization_loss", "commitment_loss"):
            one, two = getattr(layer, name)(z, codes, reduce), getattr(peer, name)(z, codes, reduce)
            assert_results({"loss": one}, {"loss": two}, name, rough)
    digits = places(peer, tokens.view(2, 12, -1))
    assert torch.equal(layer.codes_to_indices(codes), (digits * peer._basis).sum(-1).int())
    grid = [torch.Size([3, 4])]
    found, due = (dict(enumerate(of.quantize_and_project(z, True, grid))) for of in (layer, peer))
    due[2] = indices_at(peer, digits.unflatten(1, (3, 4)))
    assert_results({f"{n}": part for n, part in found.items()}, {f"{n}": part for n, part in due.items()}, "", rough)
