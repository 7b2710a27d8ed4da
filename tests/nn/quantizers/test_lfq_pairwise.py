"""Parity of `LFQ` with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, losses and their terms,
gradients, state, and codes of indices, with checkpoints handed over both ways. The rows that ours draws for the
entropies are handed to the library. Where its value is wrong the right one comes from the library itself, asked in
another way:
- probabilities under 1e-5: it takes their logarithm at 1e-5, and is freed of that;
- a mask: it takes the "batch" entropy of each row by itself, and is asked with the rows that the mask shows;
- vectors (B, dim) with channels last, and images with channels last: it raises, and is asked with sequences.
The dtype of the loss is that of the quantization; the library's may be that of the layer, or not, as its terms have it.
"""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import LFQ
from nn.quantizers.lfq_cases import CASES, OTHERS, name_of, options_of
from nn.quantizers.lfq_draws import DrawnRows
from nn.quantizers.pairwise_parity import close, rounds_alike

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
module = pytest.importorskip("vector_quantize_pytorch.lookup_free_quantization")

BATCH, GRIDS = 3, {"sequence": (12,), "image": (3, 4), "video": (2, 2, 3), "rows": ()}


@pytest.fixture
def draws(monkeypatch):
    return DrawnRows(monkeypatch, module)


def grid_of(case):
    return GRIDS[case["layout"].split(",")[0]]


def laid_out(case, tokens):
    """(B N, dim) as the case has it."""
    x = tokens.view(-1, *grid_of(case), tokens.shape[-1])
    by_default = case["layout"] in ("image", "video")
    return x.movedim(-1, 1) if by_default or case["layout"].endswith("first") else x


def batch(case, layer, number):
    """Tokens (B N, dim), mask of them or None, and the other arguments of the call."""
    generator = torch.Generator().manual_seed(100 + number)
    dtype = getattr(torch, case["dtype"])
    tokens = torch.randn(BATCH * 12, layer.dim, generator=generator).to(dtype)
    shown = None if case["mask"] == "none" else torch.rand(BATCH * 12, generator=generator) > 0.3
    call = {"return_loss_breakdown": case["breakdown"] == "yes"}
    if case["temperature"] != "default":
        learnt = case["temperature"] == "learnt"
        call["inv_temperature"] = torch.tensor(0.7, requires_grad=True) if learnt else 0.5
    return tokens, shown, call


def parts(result, call):
    """quantized, indices, loss, terms of the loss."""
    if not call["return_loss_breakdown"]:
        assert result._fields == ("quantized", "indices", "entropy_aux_loss")
        return [*result, ()]
    result, terms = result
    assert terms._fields == ("per_sample_entropy", "batch_entropy", "commitment")
    return [*result, tuple(terms)]


def ours(case, layer, tokens, shown, call):
    mask = shown
    if mask is not None:
        grid = (-1, *grid_of(case)) if case["mask"] == "as the indices" else (-1, *([12] if grid_of(case) else []))
        mask = mask.view(grid)
    return parts(layer(laid_out(case, tokens), mask=mask, **call), call)


def theirs(case, layer, tokens, shown, call):
    """The same of the library."""
    if case["layout"] in ("rows", "image, channels last"):
        results = parts(layer(tokens[None], **call), call)
        results[0] = laid_out(case, results[0][0])
        results[1] = results[1][0].unflatten(0, (-1, *grid_of(case)))
    else:
        results = parts(layer(laid_out(case, tokens), **call), call)
    if shown is not None and layer.training:
        rows = tokens[shown][None]
        results[2:] = parts(layer(rows.mT if layer.channel_first else rows, **call), call)[2:]
    return results


def run(ask, case, layer, tokens, shown, call):
    """Results and gradients of one step."""
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_(case["input"] == "learnt")
    temperature = call.get("inv_temperature")
    if isinstance(temperature, torch.Tensor):
        temperature.grad = None
    quantized, indices, loss, terms = ask(case, layer, tokens, shown, call)
    direction = torch.linspace(-1, 1, quantized.numel()).view_as(quantized)
    total = (quantized.float() * direction).sum() + 3 * loss
    if total.requires_grad:
        total.backward()
    gradients = {"tokens": tokens.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    if isinstance(temperature, torch.Tensor):
        gradients["inv_temperature"] = temperature.grad
    return {"quantized": quantized, "indices": indices, "loss": loss, "terms": terms}, gradients


def assert_same(found, due, what, rough, loss_dtype):
    (one, grad), (two, their_grad) = found, due
    assert torch.equal(one["indices"], two["indices"]), f"{what}: indices"
    assert one["indices"].dtype == two["indices"].dtype
    assert one["quantized"].dtype == two["quantized"].dtype
    assert one["quantized"].shape == two["quantized"].shape
    assert one["loss"].dtype == loss_dtype
    close(one["quantized"], two["quantized"], f"{what}: quantized", rough)
    close(one["loss"], two["loss"], f"{what}: loss", rough=False)
    for first, second in zip(one["terms"], two["terms"], strict=True):
        close(first, second, f"{what}: terms of the loss", rough=False)
    assert grad.keys() == their_grad.keys()
    for name in grad:
        close(grad[name], their_grad[name], f"{what}: gradient of {name}", rough)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case, draws):
    check(case, draws)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case, draws):
    check(case, draws)


def check(case, draws):
    dtype, rough = getattr(torch, case["dtype"]), case["dtype"] == "bfloat16"
    loss_dtype = torch.float32 if case["quantized in"] == "float32" else dtype
    torch.manual_seed(5)
    peer = upstream.LFQ(**options_of(case)).to(dtype)
    layer = LFQ(**options_of(case)).to(dtype)
    layer.load_state_dict(peer.state_dict(), strict=True)
    for one in (peer, layer):
        rounds_alike(one.project_in)
    draws.follow(peer)
    for step in range(2):
        given = batch(case, layer, step)
        draws.drawn.clear()
        found = run(ours, case, layer, *given)
        assert_same(found, run(theirs, case, peer, *given), f"step {step}", rough, loss_dtype)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if found[1][name] is not None:
                    parameter -= 1e-3 * found[1][name]
        peer.load_state_dict(layer.state_dict(), strict=True)
    peer.eval()
    layer.eval()
    given = batch(case, layer, 2)
    found = run(ours, case, layer, *given)
    assert_same(found, run(theirs, case, peer, *given), "eval", rough, loss_dtype)
    for project_out in (True, False):
        codes, due = (one.indices_to_codes(found[0]["indices"], project_out) for one in (layer, peer))
        assert codes.shape == due.shape
        assert codes.dtype == due.dtype
        close(codes, due, "codes of indices", rough)


def test_a_bfloat16_direction_is_not_rounded(draws):
    x = torch.randn(2, 9, 6).bfloat16()
    exact = LFQ(dim=6, spherical=True)(x.float(), 5.0)[2]
    off = [(kind(dim=6, spherical=True).bfloat16()(x, 5.0)[2] - exact).abs() for kind in (LFQ, upstream.LFQ)]
    assert off[0] < 1e-6
    assert off[1] > 10 * off[0]
