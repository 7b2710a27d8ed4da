"""Parity of the residual stacks with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, losses, gradients, state, codes
and outputs of indices, with checkpoints handed over both ways. What the library draws is handed to it. Where its value
is wrong the right one comes from the library itself, asked in another way: see `Peer`.
"""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch

from ferrovae import nn
from ferrovae.nn.quantizers import quantizer_dropout
from ferrovae.nn.quantizers.codebook import Codebook
from ferrovae.nn.quantizers.dead_codes import dead
from ferrovae.nn.quantizers.keyed_sampling import key_of, stratified_rows
from ferrovae.ops import _checks, _philox
from nn.quantizers.pairwise_parity import assert_same, assert_same_state
from nn.quantizers.residual_cases import (
    BATCH,
    CASES,
    DIM,
    LENGTH,
    OTHERS,
    STAGES,
    TEMPERATURE,
    Differences,
    name_of,
    options_of,
)

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
upstream_module = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")

upstream_stacks = pytest.importorskip("vector_quantize_pytorch.residual_vq")

FAST = 30  # cases, which hold nine tenths of the pairs
GRID = (3, -1)


def stacks(layer):
    """The residual stacks of a layer: its groups, or itself."""
    return list(layer.rvqs) if hasattr(layer, "rvqs") else [layer]


def pair(case):
    """Both layers from one state, with stages of ever smaller codes, which leave clear margins."""
    options = options_of(case)
    kind = "GroupedResidualVQ" if "groups" in options else "ResidualVQ"
    torch.manual_seed(5)
    theirs = getattr(upstream, kind)(**options)
    ours = getattr(nn, kind)(**options, accept_image_fmap=case["layout"] == "image")
    with torch.no_grad():
        for stack in stacks(theirs):
            for scale, stage in enumerate(stack.layers):
                book = stage._codebook
                if case["start"] == "given":
                    book.embed.copy_(torch.randn_like(book.embed) * 0.4**scale)
                    if case["metric"] == "cosine":
                        book.embed.copy_(torch.nn.functional.normalize(book.embed, dim=-1))
                    book.embed_avg.copy_(book.embed)
                book.sample_fn = first_means
                if case["shared"] == "yes":
                    book.expire_codes_ = partial(expire_once, book)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def expire_once(book, samples, **of_a_stage):
    """A shared codebook replaces its dead codes once a step, from the rows of all stages; not after every stage too."""
    if not of_a_stage:
        type(book).expire_codes_(book, samples)


def first_means(samples, size):
    """The rows that k-means starts from, as ours chooses them."""
    valid = torch.ones(samples.shape[1], dtype=torch.bool)
    key = key_of(torch.ones(1, size))
    rows, _ = stratified_rows(valid, size, key, offset=0, total=len(valid), distinct=False)
    return samples[:, rows]


@pytest.fixture
def draws(monkeypatch):
    """Hand the library the noise, the dropped stages and the rows for dead codes that ours takes."""

    def noise(scores):
        if conditioned[0]:  # codes that a network makes are drawn from noise in the library's own way
            conditioned[0] = False
            return plain_noise(scores)
        seed = _checks.seed("noise", None, None, scores.device)
        rows = torch.arange(scores.shape[1])
        return torch.stack([_philox.gumbels(seed, rows, head, scores.shape[2]) for head in range(scores.shape[0])])

    replaced, last, conditioned, replace = [], [0], [False], Codebook._replace_dead
    plain_noise = upstream_module.gumbel_noise

    def recorded(book, rows, filled):
        chosen = dead(book.cluster_size, filled, book.options.threshold_ema_dead_code)
        if chosen.any():
            replaced.append(rows[chosen][None])
        replace(book, rows, filled)

    monkeypatch.setattr(upstream_module, "gumbel_noise", noise)
    monkeypatch.setattr(Codebook, "_replace_dead", recorded)
    # A step draws no more from torch's generator than its noise, whoever takes it.
    monkeypatch.setattr(upstream_stacks, "get_maybe_sync_seed", lambda device: 0)
    monkeypatch.setattr(quantizer_dropout.QuantizerDropout, "dropout_seed", lambda self, device: torch.tensor(0))
    monkeypatch.setattr(random.Random, "randrange", lambda self, low, high: max(low, last[0]))
    monkeypatch.setattr(quantizer_dropout, "draw_last_stage", lambda low, high, **rest: torch.tensor(max(low, last[0])))
    return replaced, last, conditioned


def batch(case, theirs, number):
    """x (B, N, DIM) and the call's arguments."""
    generator = torch.Generator().manual_seed(100 + number)
    starts = case["start"] == "k-means" and number == 0
    length = 6 * LENGTH if starts else LENGTH  # or clusters of one row would leave nothing but rounding
    x = torch.randn(BATCH * length, DIM, generator=generator)
    x = x if starts else clear(theirs, x)
    x = x if case["layout"] == "single" else x.view(BATCH, length, DIM)
    call = {}
    if case["mask"] != "none":
        mask = torch.rand(BATCH, length, generator=generator) > 0.3
        # Where the library counts padding, whole positions are hidden, so that it can be called without them.
        call["mask"] = (torch.arange(length) < length - 4).expand(BATCH, -1) if Differences.padding(case) else mask
    if case["call"] == "temperature":
        call["sample_codebook_temp"] = TEMPERATURE
    if case["call"] == "frozen":
        call["freeze_codebook"] = True
    if case["call"] == "all codes":
        call["return_all_codes"] = True
    return x, call


def clear(theirs, x, margin=1e-3):
    """Replace the rows (N, DIM) of which a rounding could decide a code: the two nearest are too close in float64."""
    bad = torch.zeros(len(x), dtype=torch.bool)
    for stack, part in zip(stacks(theirs), x.chunk(len(stacks(theirs)), -1), strict=True):
        z = stack.project_in(part).detach().double()
        for stage in stack.layers:
            if not stage._codebook.initted:  # dropped so far
                break
            codes = stage._codebook.embed[0].detach().double()
            rows = torch.nn.functional.normalize(z, dim=-1) if stage.use_cosine_sim else z
            near = torch.cdist(rows, codes).topk(2, largest=False)
            bad |= near.values[:, 1] - near.values[:, 0] < margin
            z = z - codes[near.indices[:, 0]]
    return torch.where(bad[:, None], x[~bad][0], x)


def run(layer, x, call, learnt, image=False, seed=17):
    """Results of a call by name, as tokens, with the gradients of a backward pass."""
    x = x.clone().requires_grad_(learnt)
    given = x.mT.unflatten(2, GRID) if image else x
    if image and "mask" in call:
        call = {**call, "mask": call["mask"].unflatten(1, GRID)}
    layer.zero_grad()
    torch.manual_seed(seed)
    quantized, indices, losses, *codes = layer(given, **call)
    total = losses.sum() * 10
    if image:
        grouped = hasattr(layer, "rvqs")
        quantized, indices = quantized.flatten(2).mT, indices.flatten(2 if grouped else 1, -2)
        codes = [tuple(part.flatten(2, 3) for part in codes[0]) if grouped else codes[0].flatten(2, 3)] if codes else []
    total = total + (quantized * torch.linspace(-1, 1, quantized.shape[-1])).sum()
    if layer.training and total.requires_grad:
        total.backward()
    results = {"quantized": quantized, "indices": indices, "losses": losses, "gradient of x": x.grad}
    results |= {"codes": codes[0]} if codes else {}
    return results | {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}


class Peer:
    """The library's layer of a case, asked so that its answer is right where it would not be."""

    def __init__(self, case, layer, replaced, conditioned):
        self.case, self.layer, self.replaced, self.conditioned = case, layer, replaced, conditioned

        def conditions(module, *given):
            conditioned[0] = case["draws"] == "stochastic" and layer.training

        for stack in stacks(layer):
            for network in stack.mlps:
                if network is not None:
                    network.register_forward_pre_hook(conditions)
            for stage in stack.layers:
                stage._codebook.replace_sample_fn = lambda samples, count: self.replaced.pop(0)[:, :count]

    def train(self, x, call):
        """The results of one step and the state after it."""
        case, before = self.case, copy.deepcopy(self.layer)
        inside = {name: value for name, value in call.items() if name != "return_all_codes"}
        visible = x
        if "mask" in call and Differences.padding(case):
            visible = x[:, : int(call["mask"][0].sum())]
            del inside["mask"]
        if case["beam"] != "none":
            results = self._run(self._without_steps(), visible, inside)
            if "freeze_codebook" not in call:
                self._learn(visible, results["indices"], inside.get("mask"))
        else:
            results = self._run(self.layer, visible, inside)
        still = None
        if Differences.moved(case) or ("return_all_codes" in call and case["start"] == "k-means"):
            still = self._run(before, visible, {**inside, "freeze_codebook": True})
        results = still if still is not None and Differences.moved(case) else results
        if "return_all_codes" in call:
            stays = before if Differences.decoded_late(case) else self.layer
            found = results["indices"] if hasattr(stays, "rvqs") else [results["indices"]]
            codes = tuple(
                stack.get_codes_from_indices(part).detach() for stack, part in zip(stacks(stays), found, strict=True)
            )
            results["codes"] = codes if hasattr(stays, "rvqs") else codes[0]
        return results if visible is x else self._padded(results, x)

    def evaluate(self, x, call):
        """The results in eval mode, where no noise is added and no moments move."""
        for stack in stacks(self.layer):
            stack.diveq = False
            for stage in stack.layers:
                stage._codebook.update_affine = lambda *args, **kwargs: None
        return self._run(self.layer, x, call)

    def _run(self, layer, x, call):
        self.conditioned[0] = False
        for stack in stacks(layer):  # or a frozen codebook would move at the end of a step, if it is shared
            stack.shared_codebook = self.case["shared"] == "yes" and "freeze_codebook" not in call
        single = Differences.single(self.case)
        results = run(layer, x[:, None] if single else x, call, layer.training and self.case["input"] == "learnt")
        if not single:
            return results
        grouped = hasattr(layer, "rvqs")
        results["quantized"] = results["quantized"][:, 0]
        results["indices"] = results["indices"].squeeze(-2)
        results["gradient of x"] = None if results["gradient of x"] is None else results["gradient of x"][:, 0]
        if "codes" in results:
            codes = results["codes"]
            results["codes"] = tuple(part[:, :, 0] for part in codes) if grouped else codes[:, :, 0]
        return results

    def _without_steps(self):
        """A copy of which no codebook moves; `freeze_codebook` does not keep a beam from it."""
        layer = copy.deepcopy(self.layer)
        for stack in stacks(layer):
            for stage in stack.layers:
                stage._codebook.ema_update = stage._codebook.has_dead_code_replacement = False
            stack.vq_is_ema_updating = False
        return layer

    @torch.no_grad()
    def _learn(self, x, indices, mask):
        """The codebooks' steps of a beam, from the residuals of its best sequence."""
        layer = self.layer
        parts = indices if hasattr(layer, "rvqs") else [indices]
        for stack, part, found in zip(stacks(layer), x.chunk(len(parts), -1), parts, strict=True):
            residual, seen = stack.project_in(part), []
            codes = [stage._codebook.embed[0].clone() for stage in stack.layers]
            for stage, book, index in zip(stack.layers, codes, found.unbind(-1), strict=True):
                if (index == -1).all():
                    break
                stage.update_indices(residual, index, mask=mask)
                seen.append(residual)
                residual = residual - book[index.clamp(min=0)]
            if stack.shared_codebook and stack.vq_is_ema_updating:
                stack.layers[0]._codebook.update_ema()
            if stack.shared_codebook:
                stack.layers[0].expire_codes_(torch.cat(seen, dim=-2))

    def _padded(self, results, x):
        """The results of the visible tokens beside those of padding."""
        hidden = x.shape[1] - results["quantized"].shape[1]
        due = dict(results)
        padding = torch.zeros(x.shape[0], hidden, x.shape[2])
        if self.case["mask"] == "as it came":
            padding = x[:, -hidden:]
        due["quantized"] = torch.cat([results["quantized"], padding], 1)
        due["indices"] = torch.nn.functional.pad(results["indices"], (0, 0, 0, hidden), value=-1)
        if results["gradient of x"] is not None:
            due["gradient of x"] = torch.nn.functional.pad(results["gradient of x"], (0, 0, 0, hidden))
            if self.case["mask"] == "as it came":
                due["gradient of x"][:, -hidden:] = torch.linspace(-1, 1, x.shape[2])
        if "codes" in results:
            codes = results["codes"]
            grown = [
                torch.nn.functional.pad(part, (0, 0, 0, hidden))
                for part in (codes if isinstance(codes, tuple) else [codes])
            ]
            due["codes"] = tuple(grown) if isinstance(codes, tuple) else grown[0]
        return due


def assert_codes_add_up(ours, theirs, used):
    """Codes as used, not as stored, where the library gives those."""
    codes = ours.pop("codes")
    del theirs["codes"]
    total = torch.cat([part.sum(0) for part in codes], -1) if isinstance(codes, tuple) else codes.sum(0)
    if used and total.shape == ours["quantized"].shape:
        seen = (ours["indices"] >= 0).any(-1)
        seen = seen.all(0) if isinstance(codes, tuple) else seen
        torch.testing.assert_close(total[seen], ours["quantized"][seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES[:FAST], ids=name_of)
def test_a_case(case, draws):
    check(case, draws)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[FAST:] + OTHERS, ids=name_of)
def test_another_case(case, draws):
    check(case, draws)


def check(case, draws):
    replaced, last, conditioned = draws
    theirs, ours = pair(case)
    peer, image = Peer(case, theirs, replaced, conditioned), case["layout"] == "image"
    for step in range(3):
        last[0] = STAGES - 1 - step
        x, call = batch(case, theirs, step)
        found, due = run(ours, x, call, case["input"] == "learnt", image), peer.train(x, call)
        if case["start"] == "k-means" and step == 0:  # it leaves rows that are codes, whose direction is rounding
            found, due = ({n: v for n, v in part.items() if "gradient" not in n} for part in (found, due))
        if case["codes"] == "affine" and "codes" in found:
            # The moments of a shared codebook move with every stage.
            assert_codes_add_up(found, due, used=case["shared"] == "no")
        assert_same(found, due, f"step {step}")
        assert not replaced
        assert_same_state(ours, theirs, f"step {step}")
        theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.eval()
    ours.eval()
    x, call = batch(case, theirs, step + 1)
    found, due = run(ours, x, call, learnt=False, image=image), peer.evaluate(x, call)
    if case["codes"] == "affine" and "codes" in found:
        assert_codes_add_up(found, due, used=True)
    assert_same(found, due, "eval")
    assert_same_state(ours, theirs, "eval")
