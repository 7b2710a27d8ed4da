"""Parity of `BinaryMapper` with vector-quantize-pytorch 1.32 over pairs of options, in training and in evaluation.

Every case compares outputs, indices, losses and the gradient of the logits in both modes, and the entropy, the loss and
the log-probabilities by themselves. The library takes the bits that ours draws, and is seen to draw with the same
probabilities. It raises at the straight-through gradient of other dtypes than float32, and rounds probabilities in
bfloat16: there it is asked in float32.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from ferrovae.nn import BinaryMapper
from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at
from nn.quantizers.pairwise_parity import close

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "bits": {"1": {}, "3": {"bits": 3}, "8": {"bits": 8}},
    "threshold": {"one bit": {}, "less": {"kl_loss_threshold": 0.1}, "none": {"kl_loss_threshold": 0.0}},
    "evaluation": {"drawn": {}, "likelier bits": {"deterministic_on_eval": True}},
}
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "temperature": {"1": {}, "0.3": {"temperature": 0.3}, "5": {"temperature": 5.0}},
    "gradient": {"in training": {}, "yes": {"straight_through": True}, "no": {"straight_through": False}},
    "loss": {"in training": {}, "yes": {"calc_aux_loss": True}, "no": {"calc_aux_loss": False}},
    "bits taken": {"by mode": {}, "likelier": {"deterministic": True}, "drawn": {"deterministic": False}},
    "indices": {"no": {}, "yes": {"return_indices": True}},
    "reduced": {"yes": {}, "no": {"reduce_aux_kl_loss": False}},
}
CALLS = {
    "layout": {"one": (), "rows": (9,), "sequence": (3, 5), "image": (2, 3, 4), "no rows": (0,)},
    "dtype": {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16},
    "logits": {"near zero": 1.0, "far": 30.0},
    "input": {"learnt": True, "fixed": False},
}
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), ARGUMENTS.items(), CALLS.items())}
DIFFERENT: dict[str, list[Case]] = {
    "the mean loss of no rows: upstream's is NaN, ours 0; `test_binary_mapper.test_no_rows`": [
        {"layout": "no rows", "reduced": "yes"},
    ],
}
CASES, OTHERS = in_two_companies(LEVELS, chain(*DIFFERENT.values()))
name_of = naming(LEVELS)


class Draws:
    """The bits that ours draws, which the library then takes."""

    def __init__(self, monkeypatch):
        self.taken, self.replay, draw = [], False, torch.Tensor.bernoulli

        def bernoulli(probs, *arguments, **options):
            if not self.replay:
                self.taken.append((probs.clone(), draw(probs, *arguments, **options)))
                return self.taken[-1][1]
            due, bits = self.taken.pop()
            close(due.view_as(probs), probs, "probabilities")
            return bits.view_as(probs).to(probs.dtype)

        monkeypatch.setattr(torch.Tensor, "bernoulli", bernoulli)


def run(layer, logits, call, learnt, dtype):
    """one_hot, indices or None, loss, gradient of the logits."""
    logits = logits.clone().requires_grad_(learnt)
    one_hot, *indices, loss = layer(logits.to(dtype), **call)
    total = (one_hot * torch.linspace(-1, 1, one_hot.numel()).view_as(one_hot)).sum() + 3 * loss.sum()
    if total.requires_grad:
        total.backward()
    return one_hot, indices[0] if indices else None, loss, logits.grad


def check_mode(case, ours, peer, draws):
    training, dtype = ours.training, CALLS["dtype"][case["dtype"]]
    shape, learnt = (*CALLS["layout"][case["layout"]], ours.bits), CALLS["input"][case["input"]]
    logits = (CALLS["logits"][case["logits"]] * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(
        dtype
    )
    call = options_at(case, ARGUMENTS)
    passes = call.get("straight_through", training)
    other = dtype == torch.bfloat16 or (dtype == torch.float64 and passes)
    draws.replay = False
    one_hot, indices, loss, gradient = run(ours, logits, call, learnt, dtype)
    draws.replay = True
    due = run(peer, logits, call, learnt, torch.float32 if other else dtype)
    assert not draws.taken
    wide = torch.promote_types(dtype, torch.float32)
    assert one_hot.dtype == (wide if passes else torch.float32)
    assert loss.dtype == (wide if call.get("calc_aux_loss", training) else torch.float32)
    assert (one_hot.shape, loss.shape) == (due[0].shape, due[2].shape)
    close(one_hot, due[0], "one-hot")
    close(loss, due[2], "loss")
    close(gradient, due[3], "gradient", rough=dtype == torch.bfloat16)
    assert (indices is None) == (due[1] is None)
    if indices is not None:
        assert (indices.dtype, indices.shape) == (due[1].dtype, due[1].shape)
        assert torch.equal(indices, due[1])
    assert one_hot.requires_grad == due[0].requires_grad
    assert loss.requires_grad == due[2].requires_grad


def check_methods(case, ours, peer):
    dtype = CALLS["dtype"][case["dtype"]]
    logits = torch.randn(*CALLS["layout"][case["layout"]], ours.bits, generator=torch.Generator().manual_seed(2)).to(
        dtype
    )
    asked = logits.to(torch.promote_types(dtype, torch.float32))
    torch.testing.assert_close(ours.binary_entropy(logits), peer.binary_entropy(asked))
    for reduced in (True, False) if len(logits) else (False,):
        torch.testing.assert_close(ours.calc_aux_loss(logits, reduced), peer.calc_aux_loss(asked, reduced))
    indices = torch.randint(ours.num_codes, logits.shape[:-1])
    one_hot = torch.nn.functional.one_hot(indices, ours.num_codes)
    for call in ({"indices": indices}, {"one_hot": one_hot}, {"indices": indices, "sum_bits": False}):
        torch.testing.assert_close(ours.log_prob(logits, **call), peer.log_prob(asked, **call))


def check(case, monkeypatch):
    options, draws = options_at(case, OPTIONS), Draws(monkeypatch)
    peer, ours = upstream.BinaryMapper(**options), BinaryMapper(**options)
    ours.load_state_dict(peer.state_dict(), strict=True)
    peer.load_state_dict(ours.state_dict(), strict=True)
    for name in ("bits", "num_codes", "kl_loss_threshold", "deterministic_on_eval"):
        assert getattr(ours, name) == getattr(peer, name)
    assert torch.equal(ours.codes, peer.codes)
    for training in (True, False):
        peer.train(training)
        ours.train(training)
        check_mode(case, ours, peer, draws)
        check_methods(case, ours, peer)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case, monkeypatch):
    check(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case, monkeypatch):
    check(case, monkeypatch)
