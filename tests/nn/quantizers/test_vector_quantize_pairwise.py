"""Parity of `VectorQuantize` with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, losses, gradients and state,
with checkpoints handed over both ways. What the library draws is handed to it. Where its value is wrong the right one
comes from the library itself, asked in another way: see `Peer`.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize, pad

from ferrovae.nn import VectorQuantize
from ferrovae.nn.quantizers.codebook import Codebook
from ferrovae.nn.quantizers.dead_codes import dead
from ferrovae.nn.quantizers.keyed_sampling import head_keys, key_of, stratified_rows
from ferrovae.ops import _checks, _philox
from nn.quantizers.pairwise_parity import assert_same, assert_same_state
from nn.quantizers.upstream_parity import upstream, upstream_module
from nn.quantizers.vector_quantize_pairs import (
    BATCH,
    CASES,
    DIM,
    HIDDEN,
    LENGTH,
    MAPS,
    NEAREST,
    SIZE,
    TEMPERATURE,
    Differences,
    name_of,
    options_of,
)

FAST = 50  # cases, which hold more than four fifths of the pairs
GRIDS = {"image": (3, -1), "volume": (1, 3, -1)}


def pair(case):
    """Both layers from one state."""
    layers = []
    for make in (upstream.VectorQuantize, VectorQuantize):
        torch.manual_seed(5)
        layers.append(make(**options_of(case)))
    theirs, ours = layers
    book = theirs._codebook
    with torch.no_grad():
        if case["start"] == "given":
            codes = torch.randn_like(book.embed)
            book.embed.copy_(normalize(codes, dim=-1) if case["metric"] == "cosine" else codes)
            book.embed_avg.copy_(book.embed)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


class Draws:
    """What ours draws, for the rows (H, N) of the library: those of visible tokens, heads before tokens."""

    def __init__(self, case, monkeypatch):
        self.case, self.replaced = case, []
        self.grid, self.seen = (1, 1), 1  # samples and tokens of the call, and how many of these the library is given
        replace, reparam = Codebook._replace_dead, upstream_module.directional_reparam
        self.heads = 1 if case["heads"] == "one" else 2
        self.books = 2 if case["heads"] == "separate" else 1

        def recorded(book, rows, filled):
            chosen = dead(book.cluster_size, filled, book.options.threshold_ema_dead_code)
            if chosen.any():
                self.replaced += [row[which][None] for row, which in zip(rows, chosen, strict=True)]
            replace(book, rows, filled)

        def same_noise(x, codes, variance):
            if case["call"] == "topk":
                noise = torch.randn(x.shape)
            else:
                noise = self.of_rows(torch.randn(self.books, self.count(), x.shape[-1])).reshape(x.shape)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randn_like", lambda like: noise)
                return reparam(x, codes, variance)

        monkeypatch.setattr(upstream_module, "gumbel_noise", self.gumbels)
        monkeypatch.setattr(upstream_module, "directional_reparam", same_noise)
        monkeypatch.setattr(Codebook, "_replace_dead", recorded)

    def attach(self, layer):
        """Hand a layer of the library the rows for k-means and dead codes."""
        layer._codebook.sample_fn = self.first_means
        layer._codebook.replace_sample_fn = lambda samples, count: self.replaced.pop(0)[:, :count]

    def count(self):
        """Rows of a codebook of ours."""
        return self.grid[0] * self.grid[1] * self.heads // self.books

    def of_rows(self, values):
        """Ours (H, N, ...), tokens before heads, in the library's order."""
        shared = self.heads // self.books
        values = values.unflatten(1, (*self.grid, shared))[:, :, : self.seen]
        return values.transpose(2, 3).flatten(1, 3)

    def gumbels(self, scores):
        if self.case["call"] == "transform":
            noise = torch.rand(self.books, self.count(), SIZE).clamp(min=1e-20).log().neg().log().neg()
        elif self.case["call"] == "topk":
            noise = -torch.empty(1, self.count(), SIZE, dtype=torch.float64).exponential_().log()
        else:
            seed = _checks.seed("noise", None, None, scores.device)
            rows = torch.arange(self.count())
            noise = torch.stack([_philox.gumbels(seed, rows, head, SIZE) for head in range(self.books)])
        return self.of_rows(noise).to(scores.dtype)

    def first_means(self, samples, size):
        """The rows that k-means starts from, as ours chooses them among the visible ones."""
        shared = self.heads // self.books
        if shared > 1:
            samples = samples.unflatten(1, (self.grid[0], shared, -1)).transpose(2, 3).flatten(1, 3)
        valid = torch.ones(samples.shape[1], dtype=torch.bool)
        keys = head_keys(key_of(torch.ones(len(samples), size)), len(samples))
        return torch.stack(
            [
                part[stratified_rows(valid, size, key, offset=0, total=len(valid), distinct=False)[0]]
                for part, key in zip(samples, keys, strict=True)
            ]
        )


def batch(case, theirs, number):
    """Tokens (B, N, DIM) and the call's arguments, as of tokens."""
    generator = torch.Generator().manual_seed(100 + number)
    starts = case["start"] == "k-means" and number == 0
    length = 6 * LENGTH if starts else LENGTH  # or clusters of one row would leave nothing but rounding
    x = torch.randn(BATCH * length, DIM, generator=generator)
    x = x if starts else clear(theirs, x)
    x = x[:, None] if case["layout"] == "single" else x.view(BATCH, length, DIM)
    call = {}
    if case["mask"] == "lengths":
        call["lens"] = torch.tensor([length - HIDDEN] * 2 if Differences.padding(case) else [length, length // 2])
    elif case["mask"] != "none":
        mask = torch.rand(BATCH, length, generator=generator) > 0.3
        # Where the library counts padding, whole positions are hidden, so that it can be called without them.
        call["mask"] = (torch.arange(length) < length - HIDDEN).expand(BATCH, -1) if Differences.padding(case) else mask
    heads = 1 if case["heads"] == "one" else 2
    grid = (*x.shape[:2], heads)[: 2 + (heads > 1)]
    call |= {
        "breakdown": {},
        "plain": {},
        "frozen": {"freeze_codebook": True},
        "frozen layer": {},
        "thawed": {"freeze_codebook": False},
        "temperature": {"sample_codebook_temp": TEMPERATURE},
        "indices": {"indices": torch.randint(-1, SIZE, grid, generator=generator)},
        "topk": {"topk": NEAREST},
        "ema off": {"ema_update": False},
        "ema on": {"ema_update": True},
        "weight": {
            "ema_update_weight": torch.linspace(0, 1, SIZE).expand(2 if case["heads"] == "separate" else 1, SIZE)
        },
        "weight function": {"ema_update_weight": lambda sums, counts: (counts > 2).float()},
        "accumulate": {"accum_ema_update": number < 2},
        "transform": {"codebook_transform_fn": transform},
    }[case["call"]]
    if case["call"] not in ("plain", "indices"):
        call["return_loss_breakdown"] = True
    return x, call


def transform(codes, x):
    """Codes (H, K, D) of the tokens x (B, N, DIM): (H, B, N, K, D)."""
    return codes[:, None, None] * (1 + 0.3 * x.detach()[None, :, :, None, : codes.shape[-1]].tanh())


def clear(theirs, x, margin=1e-3):
    """Replace the rows (N, DIM) of which a rounding could decide a code: near ones are too alike in float64."""
    if not theirs._codebook.initted:
        return x
    with torch.no_grad():
        rows = theirs.project_in(x).unflatten(-1, (theirs.heads, -1)).movedim(1, 0).double()
        codes = theirs._codebook.embed.double()
        rows = normalize(rows, dim=-1) if theirs.use_cosine_sim else rows
        near = torch.cdist(rows, codes.expand(theirs.heads, -1, -1)).sort(-1).values[..., : NEAREST + 1]
    bad = (near.diff(dim=-1) < margin).any(-1).any(0)
    return torch.where(bad[:, None], x[~bad][0], x)


def run(layer, tokens, call, learnt, layout, seed=17):
    """Results of a call by name, as of tokens (B, N, ...), with the gradients of a backward pass."""
    tokens = tokens.clone().requires_grad_(learnt)
    x, call, grid = tokens, dict(call), GRIDS.get(layout)
    if "codebook_transform_fn" in call:
        call["codebook_transform_fn"] = partial(transform, x=tokens)
    if layout == "single":
        x = tokens[:, 0]
    elif layout != "tokens":
        x = tokens.mT if grid is None else tokens.mT.unflatten(2, grid)
    if grid is not None and "mask" in call:
        call["mask"] = call["mask"].unflatten(1, grid)
    layer.zero_grad()
    torch.manual_seed(seed)
    quantized, *others = layer(x, **call)
    if "indices" in call:
        results = {"loss": others[0]}
    else:
        axes = slice(1, 1 + len(grid or ()))
        indices, loss, *breakdown = others
        results = {"indices": indices, "loss": loss}
        if layout == "single":
            results = {name: value[:, None] if value.ndim else value for name, value in results.items()}
        elif grid is not None:
            results = {
                name: value.flatten(1, axes.stop - 1) if value.ndim else value for name, value in results.items()
            }
        # The terms of a map or a single vector are those of tokens as they are.
        results |= breakdown[0]._asdict() if breakdown else {}
    if "indices" in call and not isinstance(layer, VectorQuantize):
        quantized = put_together(layer, quantized)
    elif layout == "single":
        quantized = quantized[:, None]
    elif layout != "tokens":
        quantized = (quantized if grid is None else quantized.flatten(2, 1 + len(grid))).movedim(1, 2)
        quantized = quantized if "topk" not in call else quantized.movedim(2, -1)
    total = (quantized * torch.linspace(-1, 1, DIM)).sum() + 10 * results["loss"].sum()
    if layer.training and total.requires_grad:
        total.backward()
    results |= {"quantized": quantized, "gradient of x": tokens.grad}
    return results | {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}


def put_together(layer, quantized):
    """What the library returns for given indices, with its heads side by side and projected: (B, N, DIM)."""
    if layer.heads > 1:
        if not layer.separate_codebook_per_head:
            quantized = quantized[0].unflatten(0, (-1, layer.heads)).transpose(0, 1)
        quantized = quantized.movedim(0, 2).flatten(2)
    return layer.project_out(quantized)


class Peer:
    """The library's layer of a case, asked so that its answer is right where it would not be."""

    def __init__(self, case, layer, draws):
        self.case, self.layer, self.draws = case, layer, draws
        draws.attach(layer)

    def train(self, x, call):
        """The results of one step, which the layer then has taken."""
        for buffer in self.layer.buffers():  # kept statistics, which would hold on to their graph
            buffer.grad = None if buffer.grad is None else buffer.grad.detach()
        before = copy.deepcopy(self.layer)
        results = self._run(self.layer, x, call)
        if Differences.moved(self.case):
            book = before._codebook
            book.ema_update = book.has_dead_code_replacement = False
            self.draws.attach(before)
            call = {name: value for name, value in call.items() if name != "ema_update"}
            results = self._run(before, x, call)
        return results

    def evaluate(self, x, call):
        """The results in eval mode, where no moments move."""
        self.layer._codebook.update_affine = lambda *args, **kwargs: None
        return self._run(self.layer, x, call)

    def _run(self, layer, x, call):
        case, visible, call = self.case, x, dict(call)
        if case["mask"] != "none" and Differences.padding(case):
            visible = x[:, :-HIDDEN]
            call = {name: value for name, value in call.items() if name not in ("mask", "lens")}
            call |= {"indices": call["indices"][:, :-HIDDEN]} if "indices" in call else {}
        self.draws.grid, self.draws.seen = tuple(x.shape[:2]), visible.shape[1]
        layout = "tokens" if Differences.single(case) else case["layout"]
        if case["layout"] in MAPS:
            # The library takes no mask with a map, hidden tokens leave none, and its cross-entropy raises at one.
            whole = case["mask"] == "none" and case["commitment"] != "cross-entropy"
            layout = layout if whole else "tokens"
            layer.accept_image_fmap = whole and case["layout"] == "image"
            layer.accept_3d_fmap = whole and case["layout"] == "volume"
        results = run(layer, visible, call, layer.training and case["input"] == "learnt", layout)
        return results if visible is x else self._padded(results, x)

    def _padded(self, results, x):
        """The results of the visible tokens beside those of padding."""
        kept, hidden = self.case["mask"] == "as it came", x[:, -HIDDEN:]
        due = dict(results)
        due["quantized"] = torch.cat([results["quantized"], hidden if kept else torch.zeros_like(hidden)], 1)
        if "indices" in results:
            due["indices"] = pad(results["indices"].movedim(1, -1), (0, HIDDEN), value=-1).movedim(-1, 1)
        learnt = self.layer.training and self.case["input"] == "learnt"
        if results["gradient of x"] is None and kept and learnt:
            results["gradient of x"] = torch.zeros_like(x[:, :-HIDDEN])
        if results["gradient of x"] is not None:
            due["gradient of x"] = pad(results["gradient of x"], (0, 0, 0, HIDDEN))
            if kept:
                due["gradient of x"][:, -HIDDEN:] = torch.linspace(-1, 1, DIM)
        return due


@pytest.mark.parametrize("case", CASES[:FAST], ids=name_of)
def test_a_case(case, monkeypatch):
    check(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[FAST:], ids=name_of)
def test_another_case(case, monkeypatch):
    check(case, monkeypatch)


def check(case, monkeypatch):
    draws = Draws(case, monkeypatch)
    theirs, ours = pair(case)
    peer = Peer(case, theirs, draws)
    for step in range(3):
        x, call = batch(case, theirs, step)
        found, due = run(ours, x, call, case["input"] == "learnt", case["layout"]), peer.train(x, call)
        if case["start"] == "k-means" and step == 0:  # it leaves rows that are codes, whose direction is rounding
            found, due = ({n: v for n, v in part.items() if "gradient" not in n} for part in (found, due))
        assert_same(found, due, f"step {step}")
        assert not draws.replaced
        assert_same_state(ours, theirs, f"step {step}")
        theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.eval()
    ours.eval()
    x, call = batch(case, theirs, 3)
    assert_same(run(ours, x, call, learnt=False, layout=case["layout"]), peer.evaluate(x, call), "eval")
    assert_same_state(ours, theirs, "eval")
