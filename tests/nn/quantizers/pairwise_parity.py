"""What the tests over pairs of options share: levels of factors that quantizers have in common, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from nn.quantizers.pairwise import Case

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


def naming(levels: Mapping[str, Sequence[str]]) -> Callable[[Case], str]:
    """How a case is called: by its levels that are not their factor's first."""

    def name_of(case: Case) -> str:
        return ", ".join(f"{name} {level}" for name, level in case.items() if level != levels[name][0]) or "default"

    return name_of


class SharedDraws:
    """Stands for `torch` in a module of ours and one of the library's: both draw the same numbers for an element.

    Bernoulli draws have the probability asked for; the library's would have 1/2 whatever it asks for.
    """

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def rand_like(self, x):
        # What bfloat16 holds, or a comparison with these numbers would depend on the dtype.
        return ((torch.randint(128, x.shape, generator=self.generator) + 0.5) / 128).to(x.dtype)

    def full_like(self, x, value):
        return Coins(torch.rand(x.shape, generator=self.generator), value)

    def empty_like(self, x):
        return Coins(torch.rand(x.shape, generator=self.generator), None)

    def __getattr__(self, name):
        return getattr(torch, name)


class Coins:
    """What a Bernoulli draw is asked of: a tensor of its probability, or one of nothing."""

    def __init__(self, uniform, probability) -> None:
        self.uniform, self.probability = uniform, probability

    def bernoulli_(self, probability=None):
        return self.uniform < (self.probability if probability is None else probability)


def loaded(ours, theirs):
    """Our layer with the library's state, of which nothing was there before."""
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.fill_(1.0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0)
    return ours


@torch.no_grad()
def descend(layer, results, rate, skipped=()):
    """Move the parameters down their gradients, but for those whose name begins with one of `skipped`."""
    for name, parameter in layer.named_parameters():
        gradient = results[f"gradient of {name}"]
        if gradient is not None and not name.startswith(tuple(skipped)):
            parameter -= rate * gradient


def backward(quantized, loss=None):
    """Gradients of the loss and of a sum of what comes out in which every element has another weight."""
    direction = torch.linspace(-1, 1, quantized.numel()).view_as(quantized)
    total = (quantized.to(torch.promote_types(quantized.dtype, torch.float32)) * direction).sum()
    total = total if loss is None else total + 3 * loss
    if total.requires_grad:
        total.backward()


def close(one, two, what, rough=False):
    """Close in the measure of the largest entry."""
    tolerance = (4e-2 if rough else 2e-4) * max(1.0, float(two.detach().abs().max()) if two.numel() else 0.0)
    torch.testing.assert_close(one.double(), two.double(), rtol=0, atol=tolerance, msg=lambda m: f"{what}: {m}")


def assert_results(found, due, what, rough=False):
    """Results by name: equal shapes, dtypes and whole numbers, close floats; rough for half precision."""
    assert found.keys() == due.keys()
    for name, two in due.items():
        one, of = found[name], f"{what}: {name}"
        if name.startswith("gradient"):
            # A gradient that is missing is one of zeros.
            one, two = torch.broadcast_tensors(*(torch.zeros(()) if g is None else g for g in (one, two)))
            close(one, two, of, rough)
        elif two is None:
            assert one is None, of
        else:
            assert one.shape == two.shape, of
            assert one.dtype == two.dtype, of
            if two.is_floating_point():
                close(one, two, of, rough)
            else:
                assert torch.equal(one, two), f"{of}: {int((one != two).sum())} differ"


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
