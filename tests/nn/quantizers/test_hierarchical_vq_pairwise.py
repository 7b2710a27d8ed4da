"""Parity of `HierarchicalVQ` with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, losses, gradients, state, and
what indices decode to, with checkpoints handed over both ways. The levels that dropout keeps, noise, and the rows that
k-means starts from and that dead codes become, are drawn once for both. Where the library's value is wrong the right
one comes from the library itself, asked in another way:
- orthogonality of active codes with padding: it counts the codes of padding, and is asked with the visible cells alone;
- orthogonality of levels with codebooks of their own: it is of the codes looked up, and it takes them after their step.
bfloat16 is not compared, in which the library rounds codes and what a level leaves over:
`test_hierarchical_vq.test_precision`.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import pytest
import torch

from ferrovae.nn import HierarchicalVQ
from ferrovae.nn.quantizers.codebook import Codebook
from ferrovae.nn.quantizers.dead_codes import dead
from ferrovae.nn.quantizers.keyed_sampling import key_of, stratified_rows
from ferrovae.ops import _checks, _philox
from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at
from nn.quantizers.pairwise_parity import close, each, step_down
from nn.quantizers.upstream_parity import upstream, upstream_module

stack_module = pytest.importorskip("vector_quantize_pytorch.hierarchical_vq")

DIM, SIZE, BATCH = 6, 6, 8
SCALES: dict[str, dict[str, tuple[Any, ...]]] = {
    "sequence": {"doubling": (1, 2, 4, 8), "one": (4,), "uneven": (3, 3, 7)},
    "image": {"doubling": (1, 2, 4), "one": ((2, 3),), "uneven": ((1, 2), (2, 2), (3, 4))},
    "volume": {"doubling": (1, 2), "one": (2,), "uneven": ((1, 1, 2), (1, 2, 3))},
}
GRIDS = {"sequence": (8,), "image": (4, 6), "volume": (2, 2, 4)}
ORTHOGONAL = {"orthogonal_reg_weight": 0.5}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "books": {"shared": {}, "apart": {"shared_codebook": False}, "sizes": {"shared_codebook": False}},
    "channels": {"first": {}, "last": {"channel_first": False}},
    "sync": {"default": {}, "no": {"sync_codebook": False}},
    "decay": {"0.99": {}, "0.5": {"decay": 0.5}},
    "commitment": {"one": {}, "none": {"commitment_weight": 0.0}, "quarter": {"commitment_weight": 0.25}},
    "gradient": {"straight": {}, "rotated": {"rotation_trick": True}},
    "start": {"k-means": {}, "given": {"kmeans_init": False}, "few steps": {"kmeans_iters": 2}},
    "dead": {"below two": {}, "stay": {"threshold_ema_dead_code": 0}, "below half": {"threshold_ema_dead_code": 0.5}},
    "draws": {
        "nearest": {},
        "stochastic": {"stochastic_sample_codes": True},
        "warm": {"stochastic_sample_codes": True, "sample_codebook_temp": 1.0},
    },
    "orthogonal": {
        "none": {},
        "all": ORTHOGONAL,
        "active": {**ORTHOGONAL, "orthogonal_reg_active_codes_only": True},
        "some": {**ORTHOGONAL, "orthogonal_reg_max_codes": 4},
    },
    "share of phi": {"half": {}, "none": {"quant_resi": 0.0}, "negative": {"quant_resi": -0.25}},
    "phis": {"one": {}, "each": {"share_quant_resi": 0}, "two": {"share_quant_resi": 2}},
    "dropout": {
        "none": {},
        "half": {"nested_dropout": 0.5},
        "always": {"nested_dropout": 1.0},
        "kept": {"nested_dropout": 1.0, "nested_dropout_min_levels": 2},
    },
}
CALLS = {
    "layout": tuple(GRIDS),
    "scales": ("doubling", "one", "uneven"),
    "mask": ("none", "given", "lengths"),
    "dtype": ("float32", "float64"),
    "temperature": ("of the layer", "of the call"),
    "cutoff": ("not returned", "returned"),
    "input": ("learnt", "fixed"),
}
REFUSED: list[Case] = [*each("layout", ("image", "volume"), mask="lengths")]
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
CASES, OTHERS = in_two_companies(LEVELS, REFUSED)
name_of = naming(LEVELS)


def options_of(case):
    scales = SCALES[case["layout"]][case["scales"]]
    options = {"dim": DIM, "codebook_size": SIZE, "scales": scales, **options_at(case, OPTIONS)}
    if case["books"] == "sizes":
        options["codebook_size"] = tuple(SIZE - level for level in range(len(scales)))
    return options | {"accept_image_fmap": case["layout"] == "image", "accept_3d_fmap": case["layout"] == "volume"}


class Draws:
    """What ours draws, for the library."""

    def __init__(self, monkeypatch):
        self.replaced, self.visible, replace = [], None, Codebook._replace_dead

        def recorded(book, rows, filled):
            chosen = dead(book.cluster_size, filled, book.options.threshold_ema_dead_code)
            if chosen.any():
                self.replaced.append((chosen, rows[chosen]))
            replace(book, rows, filled)

        monkeypatch.setattr(Codebook, "_replace_dead", recorded)
        monkeypatch.setattr(upstream_module, "gumbel_noise", self.gumbels)

    def gumbels(self, scores):
        """Noise for the cells of a level, of which the library may see the visible ones alone."""
        seed = _checks.seed("noise", None, None, scores.device)
        rows = torch.arange(scores.shape[1]) if self.visible is None else self.visible.flatten().nonzero()[:, 0]
        return _philox.gumbels(seed, rows, 0, scores.shape[2])[None].to(scores.dtype)

    def attach(self, book):
        """Make a codebook of the library start and replace its dead codes as ours does."""
        replace = type(book).replace

        def first_means(samples, size):
            valid = torch.ones(samples.shape[1], dtype=torch.bool)
            key = key_of(torch.ones(1, size))
            rows, _ = stratified_rows(valid, size, key, offset=0, total=len(valid), distinct=False)
            return samples[:, rows]

        def as_ours(samples, batch_mask, seq_mask=None):
            chosen, rows = self.replaced.pop(0)
            assert (chosen <= batch_mask).all()
            seen = samples[0] if seq_mask is None else samples[0][seq_mask[0]]
            assert ((rows[:, None] - seen).abs().amax(-1).amin(-1) < 1e-4).all()
            book.replace_sample_fn = lambda samples, count: rows[None]
            replace(book, samples, chosen, seq_mask)

        book.sample_fn, book.replace = first_means, as_ours


class Peer:
    """The library's layer, whose levels can be asked in another way."""

    def __init__(self, case, draws):
        torch.manual_seed(5)
        self.case, self.draws, self.layer = case, draws, upstream.HierarchicalVQ(**options_of(case))
        self.stages = [self.layer.vq] if self.layer.vq is not None else list(self.layer.vqs)
        with torch.no_grad():
            for stage in self.stages:
                draws.attach(stage._codebook)
                if case["start"] == "given":
                    stage._codebook.embed.copy_(torch.randn_like(stage._codebook.embed))
                    stage._codebook.embed_avg.copy_(stage._codebook.embed)
        self.alone = case["mask"] != "none" and case["orthogonal"] == "active"
        library = self.layer.get_vq
        self.layer.get_vq = lambda level: self._asked(library(level)) if self.layer.training else library(level)

    def _asked(self, stage):
        def ask(x, mask=None, **call):
            if not (self.alone and mask is not None):
                return self._step(stage, x, mask, call)
            self.draws.visible = mask
            quantized, indices, loss = self._step(stage, x[mask][None], None, call)
            self.draws.visible = None
            out = torch.zeros_like(x).masked_scatter(mask[..., None], quantized)
            return out, torch.full(mask.shape, -1).masked_scatter(mask, indices), loss

        return ask

    def _step(self, stage, x, mask, call):
        if self.case["orthogonal"] == "none":
            return stage(x, mask=mask, **call)
        # Learnt codes: a copy for each level, whose gradients later levels leave alone.
        state, moves = torch.get_rng_state(), copy.deepcopy(stage)
        self.draws.attach(moves._codebook)
        results, asked = moves(x, mask=mask, **call), moves
        if self.case["books"] != "shared":
            asked = copy.deepcopy(stage)
            self.draws.attach(asked._codebook)
            asked._codebook.ema_update = asked._codebook.has_dead_code_replacement = False
            torch.set_rng_state(state)
            results = asked(x, mask=mask, **call)
        stage.load_state_dict(moves.state_dict())
        self.levels.append((stage, asked))
        return results

    def __call__(self, x, call):
        self.levels = []
        return self.layer(x, **call)

    def gradients(self):
        """Of all parameters, with those of the copies."""
        for stage, asked in self.levels:
            book, found = stage._codebook.embed, asked._codebook.embed.grad
            if found is not None:
                book.grad = found if book.grad is None else book.grad + found
        return {name: p.grad for name, p in self.layer.named_parameters()}


def make(case, peer):
    """Ours, which keeps the levels that the library draws."""
    layer = HierarchicalVQ(**options_of(case))
    drops = layer.nested_dropout > 0 and layer.nested_dropout_min_levels < layer.num_levels

    def same(device):
        cutoff = peer.layer.sample_nested_cutoff(device)
        if not drops or not layer.training:
            assert cutoff is None
            return None
        return torch.tensor(layer.num_levels - 1 if cutoff is None else cutoff)

    layer.sample_nested_cutoff = same
    return layer


def batch(case, number):
    generator = torch.Generator().manual_seed(100 + number)
    grid = GRIDS[case["layout"]]
    x = torch.randn(BATCH, DIM, *grid, generator=generator).to(getattr(torch, case["dtype"]))
    call: dict[str, Any] = {}
    if case["mask"] == "given":
        call["mask"] = torch.rand(BATCH, *grid, generator=generator) > 0.4
    if case["mask"] == "lengths":
        call["lens"] = torch.randint(1, 9, (BATCH,), generator=generator)
    if case["temperature"] == "of the call":
        call["sample_codebook_temp"] = 0.7
    if case["cutoff"] == "returned":
        call["return_cutoff"] = True
    return (x if case["channels"] == "first" else x.movedim(1, -1)), call


def run(ask, layer, gradients, x, call, learnt):
    """Results and gradients of one step."""
    layer.zero_grad()
    x = x.clone().requires_grad_(learnt)
    torch.manual_seed(17)
    out, indices, loss, *cutoff = ask(x, call)
    total = (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + 10 * loss
    if total.requires_grad:
        total.backward()
    return (out, indices, loss, cutoff), {"x": x.grad, **gradients()}


def check_step(case, ours, peer, number, seed):
    learnt = case["input"] == "learnt"
    seed[0] = 30 + number
    x, call = batch(case, number)

    def our_gradients():
        return {name: p.grad for name, p in ours.named_parameters()}

    found, gradients = run(lambda x, call: ours(x, **call), ours, our_gradients, x, call, learnt)
    due, their_gradients = run(peer, peer.layer, peer.gradients, x, call, learnt)
    out, indices, loss, cutoff = found
    assert (out.dtype, out.shape, cutoff) == (x.dtype, due[0].shape, due[3])
    for level, (one, two) in enumerate(zip(indices, due[1], strict=True)):
        assert one.dtype == two.dtype
        assert torch.equal(one, two), f"step {number}: {int((one != two).sum())} indices of level {level} differ"
    close(out, due[0], f"step {number}: reconstruction")
    close(loss, due[2], f"step {number}: loss")
    assert gradients.keys() == their_gradients.keys()
    # K-means leaves rows that are nearly codes, whose direction from each other is rounding.
    starts = number == 0 and case["start"] != "given"
    for name in gradients:
        close(gradients[name], their_gradients[name], f"step {number}: gradient of {name}", rough=starts)
    assert not peer.draws.replaced
    state = ours.state_dict()
    assert state.keys() == peer.layer.state_dict().keys()
    for name, tensor in peer.layer.state_dict().items():
        close(state[name], tensor, f"step {number}: state {name}")
    return x, call, indices, out


def check(case, draws, seed):
    peer = Peer(case, draws)
    ours = make(case, peer)
    for layer in (ours, peer.layer):
        if case["dtype"] == "float64":
            layer.double()
        if case["dtype"] == "bfloat16":  # the statistics stay in float32
            for phi in [
                module for module in layer.modules() if isinstance(getattr(module, "conv", None), torch.nn.Module)
            ]:
                phi.bfloat16()
    ours.load_state_dict(peer.layer.state_dict(), strict=True)
    for step in range(3):
        check_step(case, ours, peer, step, seed)
        step_down(ours, 1e-2)
        peer.layer.load_state_dict(ours.state_dict(), strict=True)
    ours.eval()
    peer.layer.eval()
    x, call, indices, out = check_step(case, ours, peer, 3, seed)
    if case["mask"] == "none":
        close(ours.get_output_from_indices(indices, GRIDS[case["layout"]]), out, "decoded")
    check_parts(case, ours, peer.layer, x, call, indices)


def check_parts(case, ours, theirs, x, call, indices):
    """Decoding, pooling and filling."""
    grid = GRIDS[case["layout"]]
    for given in ((), (grid,), (grid[0],)):
        one, two = (layer.get_output_from_indices(indices, *given) for layer in (ours, theirs))
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        close(one, two, "decoded")
    x = x if case["channels"] == "first" else x.movedim(-1, 1)
    for level, shape in enumerate(ours.level_shapes):
        one, two = (layer.pool_residual(x, shape, call.get("mask")) for layer in (ours, theirs))
        close(one[0], two[0], "pooled")
        assert (one[1] is None) == (two[1] is None)
        assert one[1] is None or torch.equal(one[1], two[1])
        one, two = (layer.upsample_to_full(one[0].to(x.dtype), grid, level) for layer in (ours, theirs))
        close(one, two, "filled")


@pytest.fixture
def seed(monkeypatch):
    """The seed of the library's dropout."""
    seed = [0]
    monkeypatch.setattr(stack_module, "get_maybe_sync_seed", lambda device: seed[0])
    return seed


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case, monkeypatch, seed):
    check(case, Draws(monkeypatch), seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case, monkeypatch, seed):
    check(case, Draws(monkeypatch), seed)
