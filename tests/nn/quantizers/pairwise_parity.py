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


def dtype_of(case: Case) -> torch.dtype:
    """Of the layer of a case, which autocast leaves as it is."""
    return torch.float32 if case["dtype"] == "autocast" else getattr(torch, case["dtype"])


def loaded(ours, theirs):
    """Our layer with the library's state, of which nothing was there before."""
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.fill_(1.0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0)
    return ours


def backward(quantized, loss=None):
    """Gradients of the loss and of a sum of what comes out in which every element has another weight."""
    direction = torch.linspace(-1, 1, quantized.numel()).view_as(quantized)
    total = (quantized.to(torch.promote_types(quantized.dtype, torch.float32)) * direction).sum()
    total = total if loss is None else total + 3 * loss
    if total.requires_grad:
        total.backward()


def close(one, two, what, rough=False):
    """Close in the measure of the largest entry, whatever the dtypes; a missing gradient is one of zeros."""
    one, two = (torch.zeros(()) if t is None else t for t in (one, two))
    one, two = torch.broadcast_tensors(one.double(), two.double())
    tolerance = (4e-2 if rough else 2e-4) * max(1.0, float(two.detach().abs().max()) if two.numel() else 0.0)
    torch.testing.assert_close(one, two, rtol=0, atol=tolerance, msg=lambda m: f"{what}: {m}")


def assert_results(found, due, what, rough=False):
    """Results by name: equal shapes, dtypes and whole numbers, close floats; rough for half precision."""
    assert found.keys() == due.keys()
    for name, two in due.items():
        one, of = found[name], f"{what}: {name}"
        if name.startswith("gradient"):
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


def step_down(layer, rate):
    """One step of gradient descent with the gradients that the parameters have."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


def rounds_alike(projection):
    """Make a linear layer see its rows as one matrix: torch rounds the bias of bfloat16 by how rows are laid out."""
    shapes = []

    def before(_, given):
        shapes.append(given[0].shape[:-1])
        return (given[0].reshape(-1, given[0].shape[-1]).contiguous(),)

    projection.register_forward_pre_hook(before)
    projection.register_forward_hook(lambda _, given, out: out.unflatten(0, shapes.pop()))
