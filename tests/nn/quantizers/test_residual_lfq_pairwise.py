"""Parity of `ResidualLFQ` and its groups with vector-quantize-pytorch 1.32 over pairs of options.

Every case trains both layers for some steps and then evaluates them: outputs, indices, losses, codes, gradients, state,
and what indices decode to, with checkpoints handed over both ways. How many stages dropout keeps, and the rows for the
entropies, are drawn once for both. Where the library's value is wrong the right one comes from the library itself,
asked in another way:
- what `test_lfq_pairwise` lists, of each stage;
- layouts other than sequences, with projections or with dropout: it raises, and is asked with sequences;
- `keep_num_codebooks_dim` with dropout: it raises, and is asked without;
- groups of channel-first sequences: it looks for the channels on the last axis, and is asked with sequences;
- bfloat16: it rounds what a stage leaves over, and is asked with stages of float32 between bfloat16 projections;
- codes of spherical or rotated stages: it forgets sphere and rotation, and its stages are asked one by one.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae import nn
from nn.quantizers.lfq_draws import DrawnRows
from nn.quantizers.pairwise_draws import one_dropout
from nn.quantizers.pairwise_parity import close, rounds_alike, step_down
from nn.quantizers.residual_lfq_cases import BATCH, CASES, GRIDS, OTHERS, channels_first, name_of, options_of

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
lfq_module = pytest.importorskip("vector_quantize_pytorch.lookup_free_quantization")
stack_module = pytest.importorskip("vector_quantize_pytorch.residual_lfq")


@pytest.fixture
def draws(monkeypatch):
    return DrawnRows(monkeypatch, lfq_module), one_dropout(monkeypatch, stack_module)


class Peer:
    """The library's layer of a case, asked so that its answer is right, and answering as the case is laid out."""

    def __init__(self, case):
        self.case, self.grid = case, GRIDS[case["layout"].split(",")[0]]
        self.grouped = case["groups"] != "none"
        self.laid_out = case["library"] == "as laid out"
        options = options_of(case, self.laid_out)
        self.added = case["books"] == "kept" and case["dropout"] != "none"
        if self.added:
            del options["keep_num_codebooks_dim"]
        torch.manual_seed(5)
        self.layer = (upstream.GroupedResidualLFQ if self.grouped else upstream.ResidualLFQ)(**options)
        self.layer.to(torch.float64 if case["dtype"] == "float64" else torch.float32)
        if not case["sphere"] == case["rotation"] == "no":
            for stack in stacks(self.layer):
                stack.get_codes_from_indices = partial(codes_by_stage, stack)
        if case["dtype"] == "bfloat16":
            for stack in stacks(self.layer):
                for projection in (stack.project_in, stack.project_out):
                    projection.bfloat16().register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
                rounds_alike(stack.project_in)
                stack.project_in.register_forward_hook(lambda _, given, out: out.float())

    def __call__(self, tokens, shown, call):
        results = self._ask(tokens, call)
        if shown is not None and self.layer.training:
            results["losses"] = self._ask(tokens[shown], call, rows=True)["losses"]
        return results

    def _ask(self, tokens, call, rows=False):
        if self.laid_out:
            x = tokens.mT[None, ..., None] if rows else tokens.view(-1, *self.grid, tokens.shape[-1]).movedim(-1, 1)
        else:
            x = tokens[None]
        if self.grouped:
            call = {name: value for name, value in call.items() if name != "rand_quantize_dropout_fixed_seed"}
        quantized, indices, losses, *codes = self.layer(x, **call)
        if rows:
            return {"losses": losses}
        quantized = quantized if self.laid_out else self._spread(quantized)
        found = {"quantized": self._as_asked(quantized), "indices": self._spread_indices(indices), "losses": losses}
        if codes:
            parts = [self._spread(part, 1) for part in (codes[0] if self.grouped else codes)]
            parts = [part.unsqueeze(-2) for part in parts] if self.added else parts
            found["codes"] = torch.stack(parts) if self.grouped else parts[0]
        return found

    def decoded(self, indices):
        """Codes and output."""
        if self.added:
            indices = indices.squeeze(-2)
        if not self.laid_out:
            lead = int(self.grouped)
            indices = indices.flatten(lead, lead + len(self.grid)).unsqueeze(lead)
        codes = self._spread(self.layer.get_codes_from_indices(indices), 2 if self.grouped else 1)
        parts = indices if self.grouped else [indices]  # put together here: it takes the wrong axis of maps
        output = torch.cat([s.get_output_from_indices(i) for s, i in zip(stacks(self.layer), parts, strict=True)], -1)
        output = self._spread(output)
        if self.added:
            codes, output = codes.unsqueeze(-2), output.unsqueeze(-2)
        return codes, output.movedim(-1, 1) if self.grouped and channels_first(self.case) else output

    def _spread(self, t, lead=0):
        """(..., 1, B N, ...) as (..., B, *grid, ...)."""
        return t if self.laid_out else t.squeeze(lead).unflatten(lead, (-1, *self.grid))

    def _spread_indices(self, indices):
        indices = self._spread(indices, int(self.grouped))
        return indices.unsqueeze(-2) if self.added else indices

    def _as_asked(self, quantized):
        return quantized.movedim(-1, 1) if channels_first(self.case) and not self.laid_out else quantized


def stacks(layer):
    """The residual stacks of a layer: its groups, or itself."""
    return list(layer.rvqs) if hasattr(layer, "rvqs") else [layer]


def codes_by_stage(stack, indices):
    """Indices (B, ..., q) as codes (Q, B, ..., d), by the stages' own decoding."""
    codes = []
    for stage, index in zip(stack.layers, indices.unbind(-1), strict=False):
        flat = index.clamp(min=0).reshape(-1, *([1] if stage.keep_num_codebooks_dim else []))
        found = stage.indices_to_codes(flat).view(*index.shape, -1)
        codes.append(torch.where((index >= 0)[..., None], found, 0.0))
    codes += [torch.zeros_like(codes[0])] * (len(stack.layers) - len(codes))
    return torch.stack(codes)


def batch(case, dim, number):
    """Tokens (B N, dim), which of them count or None, and the other arguments of the call."""
    generator = torch.Generator().manual_seed(100 + number)
    tokens = torch.randn(BATCH * 12, dim, generator=generator).to(getattr(torch, case["dtype"]))
    shown = None if case["mask"] == "none" else torch.rand(BATCH * 12, generator=generator) > 0.3
    call = {"return_all_codes": case["returned"] == "codes"}
    if case["seed"] == "given":
        call["rand_quantize_dropout_fixed_seed"] = 3 + number
    return tokens, shown, call


class Ours:
    def __init__(self, case):
        self.case, self.grid = case, GRIDS[case["layout"].split(",")[0]]
        self.grouped = case["groups"] != "none"
        self.layer = (nn.GroupedResidualLFQ if self.grouped else nn.ResidualLFQ)(**options_of(case))
        self.layer.to(getattr(torch, case["dtype"]))
        for stack in stacks(self.layer):
            rounds_alike(stack.project_in)

    def __call__(self, tokens, shown, call):
        x = tokens.view(-1, *self.grid, tokens.shape[-1])
        if shown is not None:
            shown = shown.view(-1, *(self.grid if self.case["mask"] == "as the indices" or not self.grid else [12]))
        x = x.movedim(-1, 1) if channels_first(self.case) else x
        quantized, indices, losses, *codes = self.layer(x, mask=shown, **call)
        found = {"quantized": quantized, "indices": indices, "losses": losses}
        if codes:
            found["codes"] = torch.stack(codes[0]) if self.grouped else codes[0]
        return found

    def decoded(self, indices):
        return self.layer.get_codes_from_indices(indices), self.layer.get_output_from_indices(indices)


def run(asked, tokens, shown, call, case):
    """Results and gradients of one step."""
    asked.layer.zero_grad()
    tokens = tokens.clone().requires_grad_(case["input"] == "learnt")
    with torch.set_grad_enabled(case["input"] != "without gradients"):
        found = asked(tokens, shown, call)
        direction = torch.linspace(-1, 1, tokens.numel()).view_as(found["quantized"])
        weights = torch.linspace(3, 1, found["losses"].numel()).view_as(found["losses"])
        total = (found["quantized"].float() * direction).sum() + (found["losses"] * weights).sum()
    if total.requires_grad:
        total.backward()
    return found, {"tokens": tokens.grad, **{name: p.grad for name, p in asked.layer.named_parameters()}}


def check_step(case, ours, theirs, number, draws):
    """Compare one step; returns its indices and output."""
    rough = case["dtype"] == "bfloat16"
    rows, seed = draws
    rows.drawn.clear()
    tokens, shown, call = batch(case, ours.layer.dim, number)
    seed[0] = call.get("rand_quantize_dropout_fixed_seed", 50 + number)
    one, gradients = run(ours, tokens, shown, call, case)
    two, their_gradients = run(theirs, tokens, shown, call, case)
    assert one.keys() == two.keys()
    exact = torch.float64 if case["dtype"] == "float64" and case["quantized in"] == "any dtype" else torch.float32
    assert (one["quantized"].dtype, one["losses"].dtype) == (tokens.dtype, exact)
    assert one["indices"].dtype == two["indices"].dtype
    assert torch.equal(one["indices"], two["indices"]), f"step {number}: indices"
    for name in two:
        assert one[name].shape == two[name].shape, name
        close(one[name], two[name], f"step {number}: {name}", rough and name != "losses")
    assert gradients.keys() == their_gradients.keys()
    for name in gradients:
        close(gradients[name], their_gradients[name], f"step {number}: gradient of {name}", rough)
    return one


def check(case, draws):
    theirs, ours = Peer(case), Ours(case)
    ours.layer.load_state_dict(theirs.layer.state_dict(), strict=True)
    theirs.layer.load_state_dict(ours.layer.state_dict(), strict=True)
    close(ours.layer.codebooks, theirs.layer.codebooks, "codebooks")
    draws[0].follow(theirs.layer)
    for step in range(2):
        check_step(case, ours, theirs, step, draws)
        step_down(ours.layer, 1e-3)
        theirs.layer.load_state_dict(ours.layer.state_dict(), strict=True)
    theirs.layer.eval()
    ours.layer.eval()
    result = check_step(case, ours, theirs, 2, draws)
    check_decoding(case, ours, theirs, result)


def check_decoding(case, ours, theirs, result):
    rough, indices = case["dtype"] == "bfloat16", result["indices"]
    codes, output = ours.decoded(indices)
    their_codes, their_output = theirs.decoded(indices)
    assert (codes.shape, output.shape) == (their_codes.shape, their_output.shape)
    close(codes, their_codes, "codes of indices", rough)
    close(output, their_output, "output of indices", rough)
    if case["dropout"] != "none" and indices.shape[-1] > 1:
        for one, two in zip(ours.decoded(indices[..., :-1]), theirs.decoded(indices[..., :-1]), strict=True):
            close(one, two, "decoded from the first stages", rough)
    # Channels are last, but in groups of maps; a kept axis of codebooks stays.
    quantized = result["quantized"]
    first = channels_first(case)
    grouped_maps = first and case["groups"] != "none"
    output = output.squeeze(-1 if grouped_maps else -2) if case["books"] == "kept" else output
    if first and not grouped_maps:
        output = output.movedim(-1, 1)
    close(output, quantized, "output", rough)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case, draws):
    check(case, draws)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case, draws):
    check(case, draws)
