"""What the tests over pairs of options share: levels of factors that quantizers have in common, and comparisons."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ferrovae.nn.quantizers import quantizer_dropout
from nn.quantizers.pairwise import Case, pairwise_cases

STRAIGHT = {"rotation_trick": False}
METRIC = {"euclidean": {}, "cosine": {"use_cosine_sim": True}}
GRADIENT = {
    "rotated": {},
    "straight": STRAIGHT,
    "not routed": {**STRAIGHT, "route_gradients_to_input": False},
}
COMMITMENT = {
    "one": {},
    "quarter": {"commitment_weight": 0.25},
    "none": {"commitment_weight": 0.0},
    "cross-entropy": {"commitment_use_cross_entropy_loss": True},
}
REGULARIZER = {
    "none": {},
    "diversity": {"codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 1.0},
    "orthogonal": {"orthogonal_reg_weight": 0.5},
    "orthogonal active": {"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True},
}
START = {"given": {}, "k-means": {"kmeans_init": True, "kmeans_iters": 3}}
DEAD = {"stay": {}, "replaced": {"threshold_ema_dead_code": 1.5}}


def each(factor: str, levels: tuple[str, ...], **other: str) -> list[Case]:
    """The other levels beside each of some levels of a factor."""
    return [{factor: level, **other} for level in levels]


def assert_same(ours, theirs, what):
    """Results by name."""
    assert ours.keys() == theirs.keys()
    for name, two in theirs.items():
        one = ours[name]
        if name.startswith("gradient"):
            # A gradient that is missing is one of zeros.
            one, two = torch.broadcast_tensors(*(torch.zeros(()) if g is None else g for g in (one, two)))
        if name == "indices":
            assert torch.equal(one, two), f"{what} indices: {int((one != two).sum())} differ"
            continue
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if name.startswith("gradient") else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(one, two, **tolerance, msg=lambda m, n=name: f"{what} {n}: {m}")


def assert_same_state(ours, theirs, what):
    """Two layers, with the statistics that they keep for their next step."""
    one, two = (
        layer.state_dict()
        | {f"kept {name}": buffer.grad for name, buffer in layer.named_buffers() if buffer.grad is not None}
        for layer in (ours, theirs)
    )
    for name in [name for name in two if name.startswith("kept ") and name.endswith("zero")]:
        del two[name]  # of a constant that is added to losses
    assert one.keys() == two.keys()
    for name, tensor in two.items():
        torch.testing.assert_close(
            one[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{what} state {n}: {m}"
        )


def in_two_companies(
    levels: Mapping[str, Sequence[str]], excluded: Iterable[Case] = ()
) -> tuple[list[Case], list[Case]]:
    """Cases with all pairs of levels, and the same pairs in other company."""
    excluded = list(excluded)
    turned = {name: tuple(levels[name])[::-1] for name in reversed(levels)}
    return pairwise_cases(levels, excluded), pairwise_cases(turned, excluded)


def options_at(case: Case, options: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The constructor's options of a case; what is a class makes its value anew."""
    found: dict[str, Any] = {}
    for factor, levels in options.items():
        found |= levels[case[factor]]
    return {name: value() if isinstance(value, type) else value for name, value in found.items()}


def named(levels: Mapping[str, Sequence[str]]):
    """Names of cases: the levels that are not their factor's first."""

    def name_of(case: Case) -> str:
        return ", ".join(f"{name} {level}" for name, level in case.items() if level != levels[name][0]) or "default"

    return name_of


def close(one, two, what, rough=False):
    """Close in the measure of the largest entry, whatever the dtypes; a missing gradient is one of zeros."""
    one, two = (torch.zeros(()) if t is None else t for t in (one, two))
    one, two = torch.broadcast_tensors(one.double(), two.double())
    tolerance = (4e-2 if rough else 2e-4) * max(1.0, float(two.detach().abs().max()) if two.numel() else 0.0)
    torch.testing.assert_close(one, two, rtol=0, atol=tolerance, msg=lambda m: f"{what}: {m}")


def step_down(layer, rate):
    """One step of gradient descent with the gradients that the parameters have."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


def one_dropout(monkeypatch, module):
    """Ours and a stack of the library's module keep the same stages, drawn from the seed that the result holds."""
    seed = [0]

    def last_stage(low, high, *, seed, batch, device):
        return torch.tensor(random.Random(int(seed)).randrange(low, high))

    def dropout_seed(self, device):
        return torch.tensor(seed[0])

    monkeypatch.setattr(module, "get_maybe_sync_seed", lambda device: seed[0])
    monkeypatch.setattr(quantizer_dropout.QuantizerDropout, "dropout_seed", dropout_seed)
    monkeypatch.setattr(quantizer_dropout, "draw_last_stage", last_stage)
    return seed


def rounds_alike(projection):
    """Make a linear layer see its rows as one matrix: torch rounds the bias of bfloat16 by how rows are laid out."""
    shapes = []

    def before(_, given):
        shapes.append(given[0].shape[:-1])
        return (given[0].reshape(-1, given[0].shape[-1]).contiguous(),)

    projection.register_forward_pre_hook(before)
    projection.register_forward_hook(lambda _, given, out: out.unflatten(0, shapes.pop()))
