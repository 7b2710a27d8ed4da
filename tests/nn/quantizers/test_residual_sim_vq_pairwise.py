"""Parity of `ResidualSimVQ` with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, losses, codes, gradients, state,
and what indices decode to, with checkpoints handed over both ways. How many stages dropout keeps is drawn once for
both. Rows are far enough from where two codes are as near, so that rounding decides no index. Where the library's
value is wrong the right one comes from the library itself, asked in another way:
- maps with channels last, and rows, with dropout: it raises, and is asked with sequences;
- bfloat16: it rounds what a stage leaves over, and is asked in float32 with a map of bfloat16.
"""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from ferrovae.nn import ResidualSimVQ
from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at
from nn.quantizers.pairwise_draws import one_dropout
from nn.quantizers.pairwise_parity import close, each, step_down
from nn.quantizers.residual_lfq_cases import OPTIONS as RESIDUAL_LFQ
from nn.quantizers.sim_vq_cases import DIM, moments_kept
from nn.quantizers.sim_vq_cases import OPTIONS as OF_A_STAGE

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
stack_module = pytest.importorskip("vector_quantize_pytorch.residual_sim_vq")

BATCH, GRIDS = 3, {"sequence": (12,), "image": (3, 4), "video": (2, 2, 3), "rows": ()}
OPTIONS = {
    **OF_A_STAGE,
    "stages": RESIDUAL_LFQ["stages"],
    "heads": {"default": {}, "given": {"heads": 1}},
    "dropout": RESIDUAL_LFQ["dropout"],
}
CALLS = {
    "layout": tuple(GRIDS),
    "dtype": ("float32", "float64", "bfloat16"),
    "seed": ("drawn", "given"),
    "returned": ("codes", "no codes"),
    "input": ("learnt", "fixed", "without gradients"),
}
REFUSED: list[Case] = [{"codes": "1", "map": "of all codes"}]  # one code has no variance
DIFFERENT: dict[str, list[Case]] = {
    "dropped stages and a map with moments: upstream's do not see the codes of stages that are dropped, ours of all; "
    "`test_moments_of_the_map_are_of_all_stages`": [
        *each("dropout", tuple(OPTIONS["dropout"])[1:], map="of all codes"),
    ],
}
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
CASES, OTHERS = in_two_companies(LEVELS, [*REFUSED, *chain(*DIFFERENT.values())])
name_of = naming(LEVELS)


@pytest.fixture
def seeds(monkeypatch):
    return one_dropout(monkeypatch, stack_module)


def make(kind, case):
    options = {"dim": DIM, "num_quantizers": 3, **options_at(case, OPTIONS)}
    torch.manual_seed(5)
    if "codebook_transform" in options:
        options["codebook_transform"] = options["codebook_transform"](options.get("frozen_codebook_dim", DIM))
    layer = kind(**options)
    if case["dtype"] != "bfloat16" or kind is ResidualSimVQ:
        return layer.to(getattr(torch, case["dtype"]))
    for stage in layer.layers:
        if not stage.code_transform._forward_hooks:  # stages may share it
            stage.code_transform.bfloat16().register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
            stage.code_transform.register_forward_hook(lambda _, given, out: out.float())
    return layer


def batch(case, peer, number):
    """Tokens (B N, D), and the arguments of the call."""
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(BATCH * 12, DIM, generator=generator).to(getattr(torch, case["dtype"]))
    residual, bad = x.double(), torch.zeros(len(x), dtype=torch.bool)
    for codes in moments_kept(peer, lambda: [stage.codebook.detach().double() for stage in peer.layers]):
        if len(codes) > 1:
            near = torch.cdist(residual, codes).topk(2, largest=False).values
            bad |= near[:, 1] - near[:, 0] < 1e-3
        residual = residual - codes[torch.cdist(residual, codes).argmin(-1)]
    call = {"return_all_codes": case["returned"] == "codes"}
    if case["seed"] == "given":
        call["rand_quantize_dropout_fixed_seed"] = 3 + number
    return torch.where(bad[:, None], x[~bad][0], x), call


def ours(case, layer, tokens, call):
    x = tokens.view(-1, *GRIDS[case["layout"]], DIM)
    return layer(x.movedim(-1, 1) if layer.channel_first else x, **call)


def theirs(case, layer, tokens, call):
    dtype = tokens.dtype
    tokens = tokens.float() if case["dtype"] == "bfloat16" else tokens
    if not in_sequences(case):
        quantized, *rest = ours(case, layer, tokens, call)
        return quantized.to(dtype), *rest
    grid = GRIDS[case["layout"]]
    quantized, indices, losses, *codes = layer(tokens[None], **call)
    quantized, indices = (t[0].unflatten(0, (-1, *grid)) for t in (quantized, indices))
    return quantized.to(dtype), indices, losses, *(part[:, 0].unflatten(1, (-1, *grid)) for part in codes)


def in_sequences(case):
    return case["dropout"] != "none" and case["channels"] == "last" and case["layout"] != "sequence"


def run(ask, case, layer, tokens, call):
    """Results and gradients of one step, by name."""
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_(case["input"] == "learnt")
    with torch.set_grad_enabled(case["input"] != "without gradients"):
        quantized, indices, losses, *codes = ask(case, layer, tokens, call)
        direction = torch.linspace(-1, 1, quantized.numel()).view_as(quantized)
        total = (quantized * direction).sum() + (losses * torch.linspace(10, 5, len(losses))).sum()
    if total.requires_grad:
        total.backward()
    gradients = {"tokens": tokens.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return {
        "quantized": quantized,
        "indices": indices,
        "losses": losses,
        **({"codes": codes[0]} if codes else {}),
    }, gradients


def check_step(case, layer, peer, number, seeds):
    rough = case["dtype"] == "bfloat16"
    tokens, call = batch(case, peer, number)
    seeds[0] = call.get("rand_quantize_dropout_fixed_seed", 50 + number)
    found, gradients = run(ours, case, layer, tokens, call)
    due, their_gradients = run(theirs, case, peer, tokens, call)
    assert found.keys() == due.keys()
    assert (found["quantized"].dtype, found["indices"].dtype) == (tokens.dtype, due["indices"].dtype)
    assert found["losses"].dtype == due["losses"].dtype
    assert torch.equal(found["indices"], due["indices"]), f"step {number}: indices"
    for name in due:
        assert found[name].shape == due[name].shape, name
        close(found[name], due[name], f"step {number}: {name}", rough)
    assert gradients.keys() == their_gradients.keys()
    for name in gradients:
        close(gradients[name], their_gradients[name], f"step {number}: gradient of {name}", rough)
    return found


def check(case, seeds):
    peer, layer = make(upstream.ResidualSimVQ, case), make(ResidualSimVQ, case)
    with torch.no_grad():
        for tensor in layer.state_dict().values():  # what is loaded is seen to be
            if tensor.is_floating_point():
                tensor.fill_(1.0)
    layer.load_state_dict(peer.state_dict(), strict=True)
    peer.load_state_dict(layer.state_dict(), strict=True)
    assert layer.codebook_size == peer.codebook_size
    for step in range(3):
        check_step(case, layer, peer, step, seeds)
        for name, tensor in peer.state_dict().items():
            close(layer.state_dict()[name], tensor, f"state {name}")
        step_down(layer, 1e-2)
        peer.load_state_dict(layer.state_dict(), strict=True)
    peer.eval()
    layer.eval()
    found = check_step(case, layer, peer, 3, seeds)
    check_decoding(case, layer, peer, found)


def check_decoding(case, layer, peer, found):
    rough, indices = case["dtype"] == "bfloat16", found["indices"]
    close(layer.codebooks, peer.codebooks, "codebooks", rough)
    kept = [indices, indices[..., :-1]] if layer.quantize_dropout else [indices]
    for some in kept:
        for method in ("get_codes_from_indices", "get_output_from_indices"):
            one, two = (getattr(each_layer, method)(some) for each_layer in (layer, peer))
            assert one.shape == two.shape
            assert one.dtype == (two.dtype if not rough else torch.bfloat16)
            close(one, two, method, rough)
    close(layer.get_output_from_indices(indices), found["quantized"], "decoded", rough)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case, seeds):
    check(case, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case, seeds):
    check(case, seeds)


def test_moments_of_the_map_are_of_all_stages():
    """No stage is skipped, so that one graph serves every draw: what dropout keeps does not change the moments."""
    moments = []
    for keeps in (0, 2):
        torch.manual_seed(1)
        layer = ResidualSimVQ(
            dim=DIM,
            num_quantizers=3,
            codebook_size=24,
            codebook_transform=torch.nn.BatchNorm1d(DIM),
            quantize_dropout=True,
            quantize_dropout_cutoff_index=keeps,
        )
        mean = torch.zeros(DIM)
        layer(torch.randn(2, 9, DIM))
        for stage in layer.layers:
            mean = 0.9 * mean + 0.1 * stage.frozen_codebook.mean(0)
        torch.testing.assert_close(layer.layers[0].code_transform.running_mean, mean)
        moments.append(layer.layers[0].code_transform.running_mean)
    torch.testing.assert_close(*moments)
