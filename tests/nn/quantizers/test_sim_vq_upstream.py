"""`SimVQ` against vector-quantize-pytorch's, where it is installed (`pip install 'ferrovae[bench]'`).

Where the two differ, and why ours is right:
- vectors far from the origin: upstream's distances are matrix products in float32, ours are exact.
- an index out of range: upstream's message depends on its indexing library, ours raises ValueError.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ferrovae.nn import SimVQ

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)


def network(*sizes):
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[-2:]))


# Options, and the shape of x: more and fewer rows than the 24 codes.
CASES = [
    ({}, (3, 20, 8)),
    ({}, (3, 5, 8)),
    ({"rotation_trick": False}, (3, 20, 8)),
    ({"rotation_trick": False, "frozen_codebook_dim": 5}, (2, 6, 8)),
    ({"codebook_transform": lambda: network(8, 10, 8)}, (3, 20, 8)),
    ({"codebook_transform": lambda: network(6, 10, 8), "frozen_codebook_dim": 6}, (3, 5, 8)),
    ({"codebook_transform": lambda: network(8, 8)[0], "channel_first": True}, (2, 8, 3, 3)),
    ({"init_fn": lambda e: e.sign(), "commitment_weight": 0.3}, (3, 20, 8)),
    ({"init_fn": lambda e: e * 2, "input_to_quantize_commit_loss_weight": 0.9, "channel_first": True}, (2, 8, 20)),
    ({"channel_first": True, "rotation_trick": False, "commitment_weight": 2.0}, (2, 8, 2, 3, 2)),
    ({"channel_first": True}, (40, 8)),
    ({"input_to_quantize_commit_loss_weight": 0.0}, (2, 3, 4, 8)),
    ({"commitment_weight": 0.0, "frozen_codebook_dim": 12}, (7, 8)),
]


def pair(options):
    """The same layer twice: the same seed gives the same parameters."""
    layers = []
    for kind in (upstream.SimVQ, SimVQ):
        given = dict(options)
        if "codebook_transform" in given:
            given["codebook_transform"] = given["codebook_transform"]()
        torch.manual_seed(5)
        layers.append(kind(8, 24, **given))
    return layers


def run(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    quantized, indices, loss = layer(x)
    ((quantized * torch.linspace(-1, 1, quantized.numel()).view_as(quantized)).sum() + 10 * loss).backward()
    return quantized, indices, loss, {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def same(ours, theirs):
    for one, two in zip(ours[:3], theirs[:3], strict=True):
        assert one.shape == two.shape
        assert one.dtype == two.dtype
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("options", "shape"), CASES)
def test_steps_of_training_then_evaluation(options, shape):
    theirs, ours = pair(options)
    optimizers = [torch.optim.SGD(layer.parameters(), 1e-2) for layer in (theirs, ours)]
    for step in range(4):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        same(run(ours, x), run(theirs, x))
        for optimizer in optimizers:
            optimizer.step()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.codebook, theirs.codebook, rtol=1e-4, atol=1e-5)
    theirs.eval()
    ours.eval()
    same(run(ours, x), run(theirs, x))
    with torch.no_grad():
        same(ours(x), theirs(x))
        indices = ours(x)[1]
        torch.testing.assert_close(ours.indices_to_codes(indices), theirs.indices_to_codes(indices))


@pytest.mark.parametrize(("options", "shape"), CASES)
def test_checkpoints_load_both_ways(options, shape):
    theirs, ours = pair(options)
    for source, target in ((theirs, pair(options)[1]), (ours, pair(options)[0])):
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        target.load_state_dict(source.state_dict(), strict=True)
        x = torch.randn(shape)
        same(target(x), source(x))


def test_upstream_loses_codes_far_from_the_origin():
    theirs, ours = pair({})
    with torch.no_grad():
        for layer in (theirs, ours):
            layer.code_transform.weight.copy_(torch.eye(8))
            layer.frozen_codebook.copy_(torch.randn(24, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + 3000)
        x = (ours.codebook + 0.01).repeat(2, 1)[None]  # torch.cdist multiplies matrices from 26 rows on
    exact = torch.cdist(x.double(), ours.codebook.double()).argmin(-1)
    assert torch.equal(ours(x)[1], exact)
    assert not torch.equal(theirs(x)[1], exact)
