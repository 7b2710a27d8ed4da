"""What the tests over pairs of options share: levels of factors that quantizers have in common, and comparisons."""

from __future__ import annotations

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
