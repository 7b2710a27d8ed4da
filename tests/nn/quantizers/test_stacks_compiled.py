"""The stacks as one graph, in training and evaluation: the same results, gradients and state as without one."""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import GroupedResidualVQ, HierarchicalVQ, ResidualVQ

GROUPED = {
    "default": {},
    "dropout": {"quantize_dropout": True, "codebook_dim": 3},
    "image": {"accept_image_fmap": True, "threshold_ema_dead_code": 2},
    "shared": {"shared_codebook": True, "use_cosine_sim": True},
}
STACKS = {
    "implicit": {"implicit_neural_codebook": True},
    "affine": {"affine_param": True},
    "learnt": {"learnable_codebook": True, "ema_update": False, "quant_grad_frac": 0.5},
    "drawn": {"stochastic_sample_codes": True},
    "diveq": {"diveq": True},
}


def results_of(call, layer, start, x, training):
    layer.load_state_dict(start)
    torch.manual_seed(0)
    inputs = x.clone().requires_grad_()
    out = call(inputs)
    if training:
        layer.zero_grad()
        (out[0].square().sum() + out[2].sum()).backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    return *out, inputs.grad, gradients, state


def assert_one_graph(layer, x):
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        layer.train(training)
        both = [results_of(call, layer, start, x, training) for call in (layer, compiled)]
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", GROUPED)
def test_grouped_stacks(case):
    torch.manual_seed(1)
    layer = GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=6, **GROUPED[case])
    assert_one_graph(layer, torch.randn(2, 8, 3, 4) if case == "image" else torch.randn(2, 9, 8))


@pytest.mark.slow
@pytest.mark.parametrize("case", STACKS)
def test_stacks(case):
    torch.manual_seed(1)
    layer = ResidualVQ(dim=8, num_quantizers=2, codebook_size=6, **STACKS[case])
    assert_one_graph(layer, torch.randn(2, 9, 8))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_hierarchies(shared):
    torch.manual_seed(1)
    layer = HierarchicalVQ(dim=4, codebook_size=3, scales=(1, 4), shared_codebook=shared, kmeans_init=False)
    assert_one_graph(layer, torch.randn(3, 4, 8))
