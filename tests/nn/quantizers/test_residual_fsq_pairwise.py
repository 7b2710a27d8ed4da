"""Parity of the residual FSQ with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, gradients, state, codes and
outputs of indices, and attributes, with checkpoints handed over both ways. Both draw the same noise, with the
probability asked for, and keep equally many stages. Rows lie so that rounding decides no index. Where the library
raises or is wrong it is asked in another way, see `Peer`:
- whatever is neither a sequence nor channel first, groups of either but for maps that are channel first, and kept axes
  of channel-first indices, as sequences;
- all codes, where they come from indices that are channel first, as codes of indices;
- codes of a rotated stage: they are rotated back here;
- bfloat16 layers, of which it rounds what it computes: their stacks are float32 ones between their projections.
Two dtypes are not compared: of indices where stages may be dropped, and of what comes of bfloat16 input; see
`test_residual_fsq_upstream`.
"""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

from ferrovae import nn
from ferrovae.nn.quantizers import fsq, quantizer_dropout
from nn.quantizers.pairwise_draws import SharedDraws, shared_draws
from nn.quantizers.pairwise_parity import assert_results, backward, close, loaded, step_down
from nn.quantizers.residual_fsq_cases import CASES, OTHERS, name_of, options_of

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
module = pytest.importorskip("vector_quantize_pytorch.finite_scalar_quantization")
upstream_stacks = pytest.importorskip("vector_quantize_pytorch.residual_fsq")

pytestmark = pytest.mark.filterwarnings("ignore:FSQ. orthogonal_rotation mixes channels")

BATCH, GRIDS = 3, {"sequence": (12,), "image": (3, 4), "video": (2, 2, 3), "rows": ()}
# How far from where it would become another code a number stays, in steps between codes.
MARGIN = 5e-3
# The dtypes of layers and of their input.
LAYERS = {"float64": torch.float64, "bfloat16": torch.bfloat16}
INPUTS = {**LAYERS, "bfloat16 input": torch.bfloat16}
EXACT = ("bfloat16", "autocast")


class StepDraws(SharedDraws):
    """Noise, and the seeds of the stages that are dropped: of a step the first one asked for, then others."""

    seed, asked = 0, 0

    def new_step(self):
        self.asked = 0

    def next_seed(self):
        self.asked += 1
        return self.seed + 7 * (self.asked - 1)


@pytest.fixture
def draws(monkeypatch):
    """The same noise and the same number of stages for both."""
    shared = shared_draws(monkeypatch, module, fsq, draws=StepDraws())
    monkeypatch.setattr(
        quantizer_dropout,
        "draw_last_stage",
        lambda low, high, *, seed, **rest: torch.tensor(random.Random(int(seed)).randrange(low, high)),
    )
    monkeypatch.setattr(upstream_stacks, "get_maybe_sync_seed", lambda device: shared.next_seed())
    monkeypatch.setattr(
        quantizer_dropout.QuantizerDropout, "dropout_seed", lambda self, device: torch.tensor(shared.next_seed())
    )
    return shared


def stacks(layer):
    """The residual stacks of a layer: its groups, or itself."""
    return list(layer.rvqs) if hasattr(layer, "rvqs") else [layer]


def pair(case, draws):
    options, dtype = options_of(case), LAYERS.get(case["dtype"], torch.float32)
    kind = "GroupedResidualFSQ" if "groups" in options else "ResidualFSQ"
    torch.manual_seed(5)
    peer = getattr(upstream, kind)(**options).to(dtype)
    make_exact(case, peer)
    layer = loaded(getattr(nn, kind)(**options).to(dtype), peer)
    for one in (peer, layer):
        for number, stack in enumerate(stacks(one)):
            restart_noise(stack, number, draws)
    return peer, layer


def restart_noise(stack, number, draws):
    """Or the noise of a stage that only one layer computes would move that of the groups after."""
    stack.register_forward_pre_hook(lambda *_: draws.restart(10 * draws.seed + number))


@torch.no_grad()
def make_exact(case, layer):
    """Weights so coarse that half precision holds their sums over coarse tokens, however they are added up."""
    if case["dtype"] in EXACT:
        for parameter in layer.parameters():
            parameter.copy_((parameter * 4).round() / 4)


def draw(case, rows, dim, generator):
    tokens = torch.randn(rows, dim, generator=generator)
    tokens = (tokens * 4).round() / 4 if case["dtype"] in EXACT and case["dim"] == "given" else tokens
    return tokens.to(INPUTS.get(case["dtype"], torch.float32))


def seeds(stack):
    """A seed for each of three steps, that of the fewest stages first."""
    low, high, multiple = stack.quantize_dropout_cutoff_index, stack.num_quantizers, stack.quantize_dropout_multiple_of
    if not stack.quantize_dropout:
        return [3, 4, 5]
    kept = {seed: -(-(random.Random(seed).randrange(low, high) + 1) // multiple) * multiple for seed in range(60)}
    by_kept = {min(stages, high): seed for seed, stages in kept.items()}
    return ([seed for _, seed in sorted(by_kept.items())] * 3)[:3]


def laid_out(case, tokens):
    """Tokens (B, N, D) as the case has them."""
    x = tokens.reshape(-1, *GRIDS[case["layout"]], tokens.shape[-1])
    return x.movedim(-1, 1) if case["channels"] == "first" or case["maps"] == "yes" else x


def context(case):
    return torch.autocast("cpu", torch.bfloat16) if case["dtype"] == "autocast" else nullcontext()


class Peer:
    """The library's layer, asked for the results that ours lays out as the case has it."""

    def __init__(self, case, layer, draws):
        self.case, self.layer, self.draws, self.inner = case, layer, draws, stacks(layer)
        self.grouped = hasattr(layer, "rvqs")
        first, kept = case["channels"] == "first", case["books"] == "kept"
        groups_of_either = self.grouped and first != (case["maps"] == "yes")
        self.native = not groups_of_either and not (first and kept) and (first or case["layout"] == "sequence")
        if not self.native:
            layer.accept_image_fmap = False
            for stack in stacks(layer):
                stack.is_channel_first = False

    def __call__(self, tokens, return_all_codes=False, **call):
        """quantized, indices (G, B, ..., Q), codes (Q, B, ..., d) of each group; or without the G."""
        case, plain = self.case, self.native and case_is_sequence(self.case)
        given = laid_out(case, tokens) if self.native else tokens
        self.draws.new_step()
        asks = return_all_codes and plain and case["rotation"] == "no"
        quantized, indices, *codes = self.layer(given, **call, **({"return_all_codes": True} if asks else {}))
        if not self.native:
            quantized = laid_out(case, quantized)
        parts = list(indices) if self.grouped else [indices]
        if self.native and case["channels"] == "first":
            parts = [part.movedim(1, -1) for part in parts]
        elif not self.native:
            parts = [part.reshape(-1, *GRIDS[case["layout"]], *part.shape[2:]) for part in parts]
        if asks:
            codes = list(codes[0]) if self.grouped else codes
        elif return_all_codes:
            codes = self.codes(parts)
        return quantized, parts, codes

    def codes(self, parts):
        """Codes (Q, B, ..., d) of indices (B, ..., Q) of each group."""
        return [self._codes(stack, part) for stack, part in zip(self.inner, parts, strict=True)]

    def outputs(self, parts):
        """What indices (B, ..., Q) of each group decode to, (B, ..., D)."""
        if self.case["rotation"] == "no":
            pairs = zip(stacks(self.layer), parts, strict=True)
            return torch.cat([stack.get_output_from_indices(part) for stack, part in pairs], -1)
        pairs = zip(stacks(self.layer), self.codes(parts), strict=True)
        return torch.cat([stack.project_out(codes.sum(0)) for stack, codes in pairs], -1)

    def _codes(self, stack, indices):
        codes = stack.get_codes_from_indices(indices)
        if self.case["rotation"] == "no":
            return codes
        pairs = zip(codes, stack.layers, stack.scales, strict=True)
        return torch.stack([(part / scale) @ stage.orthogonal_rot.T * scale for part, stage, scale in pairs])


class HalfPeer(Peer):
    """The library's layer of half precision, but for its stacks, which are float32 with what the layer rounded."""

    def __init__(self, case, layer, draws):
        super().__init__(case, layer, draws)
        outside = ("dim", "groups", "accept_image_fmap", "is_channel_first")
        inner = {name: value for name, value in options_of(case).items() if name not in outside}
        self.inner = [upstream.ResidualFSQ(**inner) for _ in stacks(layer)]
        for number, (core, stack) in enumerate(zip(self.inner, stacks(layer), strict=True)):
            restart_noise(core, number, draws)
            core.load_state_dict({name: part for name, part in stack.state_dict().items() if "project" not in name})
            if core.soft_clamp_input_value is not None:
                core.soft_clamp_input_value.copy_(stack.soft_clamp_input_value)

    def __call__(self, tokens, return_all_codes=False, rand_quantize_dropout_fixed_seed=None):
        case, outputs, found = self.case, [], []
        self.draws.new_step()
        seed = self.draws.next_seed() if self.grouped else rand_quantize_dropout_fixed_seed
        chunks = tokens.chunk(len(self.inner), -1)
        for core, stack, x in zip(self.inner, stacks(self.layer), chunks, strict=True):
            z = stack.project_in(x)
            quantized, indices = core.train(stack.training)(z.float(), rand_quantize_dropout_fixed_seed=seed)
            outputs.append(stack.project_out(quantized.to(z.dtype)))
            found.append(indices.reshape(-1, *GRIDS[case["layout"]], *indices.shape[2:]))
        return laid_out(case, torch.cat(outputs, -1)), found, self.codes(found) if return_all_codes else []

    def outputs(self, parts):
        sums = [codes.sum(0) for codes in self.codes(parts)]
        pairs = zip(stacks(self.layer), sums, strict=True)
        return torch.cat([s.project_out(q.to(getattr(s.project_out, "weight", q).dtype)) for s, q in pairs], -1)


def case_is_sequence(case):
    return case["layout"] == "sequence" and case["channels"] == "last" and case["maps"] == "no"


def clear_tokens(case, peer, number, call):
    """Tokens (B, N, D) of which a rounding decides no code of a stage, given the noise of the stages before."""
    generator = torch.Generator().manual_seed(100 + number)
    dim = options_of(case).get("dim", len(options_of(case)["levels"]))
    rows = BATCH * 12
    tokens = draw(case, rows, dim, generator)
    tight = torch.ones(rows, dtype=torch.bool)

    def look(stage, given):
        levels = stage._levels - 1
        z = given[0].reshape(rows, -1).double()
        z = z @ stage.orthogonal_rot.double() if stage.orthogonal_rotation else z
        place = levels * ((z.clamp(-1, 1) if stage.bound_hard_clamp else z.tanh()) + 1) / 2 + 0.5
        near = (place - place.round()).abs() < MARGIN
        if stage.bound_hard_clamp:
            near = (near & (z.abs() < 1)) | ((z.abs() - 1).abs() < MARGIN / levels)
        tight.logical_or_(near.any(-1))

    hooks = [stage.register_forward_pre_hook(look) for stack in peer.inner for stage in stack.layers]
    for _ in range(60):
        tokens[tight] = draw(case, int(tight.sum()), dim, generator)
        tight.zero_()
        with context(case), torch.set_grad_enabled(case["input"] != "without gradients"):  # or stages are dropped
            peer(sequence(case, tokens), **call)
        if not tight.any():
            break
    assert not tight.any()
    for hook in hooks:
        hook.remove()
    return sequence(case, tokens)


def sequence(case, rows):
    """Rows (B N, D) as (B, N, D), N = 1 of rows that are no sequences."""
    return rows[:, None] if case["layout"] == "rows" else rows.view(BATCH, 12, -1)


def run(ask, layer, case, tokens, call):
    """Results and gradients of one step."""
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_(case["input"] == "learnt")
    with context(case), torch.set_grad_enabled(case["input"] != "without gradients"):
        quantized, indices, codes = ask(tokens, **call)
    backward(quantized)
    results = {"quantized": quantized, "indices": torch.stack(indices), "gradient of x": tokens.grad}
    results |= {"codes": torch.stack(codes)} if codes else {}
    return results | {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}


def asked(case, layer, draws):
    """Our layer, called as the case has it, its indices with the stages last and a list of groups."""

    def ask(tokens, **call):
        x = laid_out(case, tokens)
        draws.new_step()
        quantized, indices, *codes = layer(x, **call)
        assert quantized.shape == x.shape
        assert quantized.dtype == x.dtype or case["dtype"] == "autocast"
        parts = list(indices) if hasattr(layer, "rvqs") else [indices]
        parts = [part.movedim(1, -1) if case["channels"] == "first" else part for part in parts]
        return quantized, parts, [*codes[0]] if codes and hasattr(layer, "rvqs") else codes

    return ask


def comparable(case, results, stack):
    """Results without the dtypes that differ."""
    results = dict(results)
    if stack.quantize_dropout:
        results["indices"] = results["indices"].long()
    if case["dtype"] == "bfloat16 input":
        results["quantized"] = results["quantized"].float()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case, draws):
    check(case, draws)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case, draws):
    check(case, draws)


def check(case, draws):
    rough = case["dtype"] in ("bfloat16", "bfloat16 input", "autocast")
    theirs, layer = pair(case, draws)
    peer = (HalfPeer if case["dtype"] == "bfloat16" else Peer)(case, theirs, draws)
    stack = stacks(layer)[0]
    for step, seed in enumerate(seeds(stack)):
        training = step < 2
        theirs.train(training)
        layer.train(training)
        # One that is given is not the one that would be drawn.
        draws.seed = seed + 1 if case["seed"] == "given" and not peer.grouped else seed
        call = {"return_all_codes": True} if case["call"] == "all codes" else {}
        if case["seed"] == "given" and not peer.grouped:
            call["rand_quantize_dropout_fixed_seed"] = seed
        tokens = clear_tokens(case, peer, step, call)
        found = comparable(case, run(asked(case, layer, draws), layer, case, tokens, call), stack)
        due = comparable(case, run(peer, theirs, case, tokens, call), stack)
        assert_results(found, due, f"step {step}", rough)
        assert_decoding(case, layer, peer, found, rough)
        if training:
            step_down(layer, 1e-2)
            make_exact(case, layer)
            theirs.load_state_dict(layer.state_dict(), strict=True)
    assert_attributes(case, layer, theirs, rough)


@torch.no_grad()
def assert_decoding(case, layer, peer, found, rough):
    """Codes and outputs of indices, also of those that end early and of tokens without a code."""
    first, every = case["channels"] == "first", stacks(layer)[0].num_quantizers
    parts = list(found["indices"])
    blank = [part.long() for part in parts]
    for part in blank:
        part[0] = -1
    cases = [parts, blank]
    if stacks(layer)[0].quantize_dropout and not first:
        cases.append([part[..., : every - 1] for part in blank])
    for given in cases:
        # Channel first as the layer gives them, which the library does not take.
        mine = [part.movedim(-1, 1) if first else part for part in given]
        mine = torch.stack(mine) if peer.grouped else mine[0]
        codes, due = layer.get_codes_from_indices(mine), torch.stack(peer.codes(given))
        assert_results({"codes": codes if peer.grouped else codes[None]}, {"codes": due}, "of indices", rough)
        wanted = peer.outputs(given)
        wanted = wanted.movedim(-1, 1) if first or case["maps"] == "yes" else wanted
        assert_results({"output": layer.get_output_from_indices(mine)}, {"output": wanted}, "of indices", rough)


def assert_attributes(case, layer, theirs, rough):
    for one, two in zip(stacks(layer), stacks(theirs), strict=True):
        names = ["codebook_size", "levels", "num_quantizers", "has_projections", "quantize_dropout"]
        for name in [*names, "quantize_dropout_cutoff_index", "quantize_dropout_multiple_of"]:
            assert getattr(one, name) == getattr(two, name), name
        close(one.scales, two.scales, "scales", rough)
        assert (one.soft_clamp_input_value is None) == (two.soft_clamp_input_value is None)
        if two.soft_clamp_input_value is not None:
            close(one.soft_clamp_input_value, two.soft_clamp_input_value, "soft clamp")
        if case["rotation"] == "no":
            close(one.codebooks, two.codebooks, "codebooks", rough)
    assert layer.codebook_size == theirs.codebook_size
    if hasattr(layer, "rvqs"):
        assert (layer.dim, layer.groups) == (theirs.dim, theirs.groups)
        assert layer.codebooks.shape == theirs.codebooks.shape
