"""VectorQuantize as one graph, option by option: what compiled and eager steps give is the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae.nn import VectorQuantize
from nn.quantizers.vector_quantize_cases import DIM, SEQUENCES, SIZE

SHAPE = 2, 20


def moved(codes, condition):
    return codes[:, None, None] + 0.3 * torch.tanh(condition)[None, :, :, None] * codes[:, None, None].sin()


# torch's optimizers break a graph themselves; with a manual update the rest is whole.
CASES = {name: (options, {}) for name, options in SEQUENCES.items() if "in place" not in name or "manual" in name} | {
    "stochastic": ({"stochastic_sample_codes": True}, {}),
    "dead codes": ({"threshold_ema_dead_code": 1}, {}),
    "dead codes affine heads": (
        {
            "threshold_ema_dead_code": 1,
            "affine_param": True,
            "heads": 2,
            "separate_codebook_per_head": True,
            "codebook_dim": 6,
        },
        {},
    ),
    "orthogonal active some": (
        {"orthogonal_reg_weight": 2.0, "orthogonal_reg_active_codes_only": True, "orthogonal_reg_max_codes": 5},
        {},
    ),
    "diversity moving": ({"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 1.0}, {}),
    "cross-entropy moving": ({"commitment_use_cross_entropy_loss": True}, {}),
    "soft moving": ({"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False}, {}),
    "topk": ({}, {"topk": 3}),
    "mask": ({}, {"mask": torch.arange(20) < torch.tensor([20, 7])[:, None]}),
    "lens": ({"codebook_dim": 5}, {"lens": torch.tensor([20, 7])}),
    "indices": ({}, {"indices": torch.arange(40).view(SHAPE) % SIZE}),
    "accumulated": ({}, {"accum_ema_update": True}),
    "weight": ({}, {"ema_update_weight": torch.linspace(0, 1, SIZE)}),
    "transform": (
        {"learnable_codebook": True, "ema_update": False},
        {"codebook_transform_fn": partial(moved, condition=torch.linspace(-1, 1, 40 * DIM).view(*SHAPE, DIM))},
    ),
}


def taken(layer, module, x, arguments):
    """Results, gradients and state after a step."""
    layer.zero_grad()
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    quantized, *others = module(x, **arguments)
    loss = others[-1].sum() + (quantized * torch.linspace(-1, 1, quantized.numel()).view(quantized.shape)).sum()
    if loss.requires_grad:
        loss.backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters()), layer._codebook.cluster_size.grad]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    return quantized, others, [torch.zeros(()) if grad is None else grad for grad in gradients], state


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_steps_are_eager_ones(case, training):
    options, arguments = CASES[case]
    torch._dynamo.reset()
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        bridge = {"vq_bridge": torch.nn.Linear(DIM, DIM)} if "vq_bridge" in options else {}
        layers.append(VectorQuantize(DIM, SIZE, **options | bridge).train(training))
    eager, layer = layers
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(*SHAPE, DIM)
        torch.testing.assert_close(
            taken(layer, compiled, x, arguments), taken(eager, eager, x, arguments), rtol=1e-4, atol=1e-5
        )
