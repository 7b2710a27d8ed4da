"""Parity with vector-quantize-pytorch itself, where it is installed (`pip install 'ferrovae[bench]'`).

Every case is a dict of options, run for several training steps and then in eval mode: outputs, losses, gradients of
the input and of all parameters, and the state. Where the right value is another, see `DIFFERENT` and
`test_vector_quantize_defects.py`.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae.nn import VectorQuantize
from ferrovae.nn.quantizers import dead_codes, kmeans
from ferrovae.ops import _philox

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
theirs_module = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")

DIM, SIZE, BATCH, LENGTH = 12, 16, 3, 20

# What differs on purpose, and why; each has a test in test_vector_quantize_defects.py.
DIFFERENT = {
    "mask with codebook_dim, heads or cosine": "upstream compares codes with the input before projection and scaling",
    "mask in diversity, active codes, cross-entropy": "padding takes no part; upstream counts it",
    "all masked, or not a finite row": "upstream's loss and codebook become NaN",
    "gradients of cross-entropy and diversity": "upstream takes them at the codebook after its update",
    "diversity with separate codebooks": "upstream averages code k of one codebook with code k of another",
    "diversity's entropy": "upstream clamps probabilities at 1e-5 inside the logarithm",
    "affine_param in eval mode or frozen": "the statistics stand still",
    "affine_param with dead codes": "a code becomes the row as the lookup sees it, upstream stores the row unmoved",
    "indices= with heads, projection or feature maps": "upstream returns the vectors before they are put together",
    "decoding with shared heads, projected feature maps, affine_param, vq_bridge": "upstream's is not what forward gave",
    "decoding -1": "a zero code, upstream gives the last",
    "update_indices with -1": "counts nothing, upstream counts code 0",
    "lens with channel_last=False": "upstream makes the mask as long as the channels",
    "loss in eval mode": "never requires a gradient; upstream's does after a training step",
    "loss that depends on nothing": "requires no gradient",
    "zero vectors under the rotation trick": "their gradient is finite and not 1e6 times the code's length",
}

SEQUENCES = {
    "default": {},
    "projection": {"codebook_dim": 5},
    "layernorm": {"codebook_dim": 5, "layernorm_after_project_in": True, "decay": 0.5},
    "cosine": {"use_cosine_sim": True, "decay": 0.5},
    "cosine projection straight": {"use_cosine_sim": True, "codebook_dim": 5, "rotation_trick": False},
    "no rotation": {"rotation_trick": False, "commitment_weight": 0.25, "eps": 1e-3},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable projection": {"learnable_codebook": True, "ema_update": False, "codebook_dim": 5},
    "learnable frozen": {"learnable_codebook": True, "ema_update": False, "freeze_codebook": True},
    "learnable sync update": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3},
    "sync update straight": {
        "learnable_codebook": True,
        "ema_update": False,
        "sync_update_v": 1.0,
        "rotation_trick": False,
    },
    "no ema": {"ema_update": False},
    "manual ema": {"manual_ema_update": True},
    "frozen soft": {"codebook_dim": 5, "straight_through": True, "rotation_trick": False, "freeze_codebook": True},
    "soft not routed": {
        "straight_through": True,
        "rotation_trick": False,
        "route_gradients_to_input": False,
        "freeze_codebook": True,
        "sample_codebook_temp": 0.5,
    },
    "soft cosine": {
        "straight_through": True,
        "rotation_trick": False,
        "use_cosine_sim": True,
        "freeze_codebook": True,
        "route_gradients_to_input": False,
    },
    "no commitment": {"commitment_weight": 0.0},
    "cross-entropy": {"commitment_use_cross_entropy_loss": True, "freeze_codebook": True},
    "cross-entropy learnable": {
        "commitment_use_cross_entropy_loss": True,
        "learnable_codebook": True,
        "ema_update": False,
        "codebook_dim": 5,
    },
    "cross-entropy cosine": {
        "commitment_use_cross_entropy_loss": True,
        "use_cosine_sim": True,
        "freeze_codebook": True,
        "commitment_weight": 0.5,
    },
    "diversity": {
        "codebook_diversity_loss_weight": 0.3,
        "codebook_diversity_temperature": 1.0,
        "freeze_codebook": True,
    },
    "diversity cosine": {
        "codebook_diversity_loss_weight": 0.3,
        "codebook_diversity_temperature": 2.0,
        "freeze_codebook": True,
        "use_cosine_sim": True,
        "heads": 3,
        "codebook_dim": 4,
    },
    "diversity learnable": {
        "codebook_diversity_loss_weight": 0.3,
        "codebook_diversity_temperature": 1.0,
        "learnable_codebook": True,
        "ema_update": False,
    },
    "orthogonal": {"orthogonal_reg_weight": 2.0},
    "orthogonal active": {"orthogonal_reg_weight": 2.0, "orthogonal_reg_active_codes_only": True},
    "orthogonal some": {"orthogonal_reg_weight": 2.0, "orthogonal_reg_max_codes": 5},
    "orthogonal active enough": {
        "orthogonal_reg_weight": 2.0,
        "orthogonal_reg_active_codes_only": True,
        "orthogonal_reg_max_codes": SIZE,
        "ema_update": False,
        "learnable_codebook": True,
    },
    "orthogonal soft not routed": {
        "orthogonal_reg_weight": 1.0,
        "straight_through": True,
        "rotation_trick": False,
        "route_gradients_to_input": False,
        "freeze_codebook": True,
    },
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1e-9},
    "directional loud not learnt": {
        "directional_reparam": True,
        "threshold_ema_dead_code": 1e-9,
        "directional_reparam_variance": 0.1,
        "learnable_codebook": False,
        "ema_update": True,
    },
    "directional not routed": {
        "directional_reparam": True,
        "threshold_ema_dead_code": 1e-9,
        "route_gradients_to_input": False,
        "codebook_dim": 5,
    },
    "heads": {"heads": 4, "codebook_dim": 3},
    "heads projection": {"heads": 2, "codebook_dim": 5, "rotation_trick": False},
    "heads cosine orthogonal": {
        "heads": 2,
        "codebook_dim": 5,
        "use_cosine_sim": True,
        "orthogonal_reg_weight": 1.0,
        "orthogonal_reg_active_codes_only": True,
    },
    "heads cross-entropy": {
        "heads": 2,
        "codebook_dim": 6,
        "commitment_use_cross_entropy_loss": True,
        "freeze_codebook": True,
    },
    "separate": {"heads": 4, "codebook_dim": 3, "separate_codebook_per_head": True},
    "separate projection cosine": {
        "heads": 2,
        "codebook_dim": 5,
        "separate_codebook_per_head": True,
        "use_cosine_sim": True,
    },
    "separate cross-entropy learnable": {
        "heads": 2,
        "codebook_dim": 6,
        "separate_codebook_per_head": True,
        "commitment_use_cross_entropy_loss": True,
        "learnable_codebook": True,
        "ema_update": False,
    },
    "separate orthogonal": {
        "heads": 2,
        "codebook_dim": 6,
        "separate_codebook_per_head": True,
        "orthogonal_reg_weight": 1.0,
        "orthogonal_reg_max_codes": 7,
    },
    "separate one head": {"separate_codebook_per_head": True, "heads": 1},
    "affine": {"affine_param": True},
    "affine learnable": {
        "affine_param": True,
        "learnable_codebook": True,
        "ema_update": False,
        "affine_param_batch_decay": 0.9,
        "affine_param_codebook_decay": 0.5,
    },
    "affine heads": {"affine_param": True, "heads": 2, "codebook_dim": 6, "separate_codebook_per_head": True},
    "affine orthogonal cross-entropy": {
        "affine_param": True,
        "learnable_codebook": True,
        "ema_update": False,
        "commitment_use_cross_entropy_loss": True,
        "orthogonal_reg_weight": 1.0,
    },
    "bridge": {"vq_bridge": "linear"},
    "bridge affine": {"vq_bridge": "linear", "affine_param": True, "sync_update_v": 0.2},
    "in place": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=5.0),
    },
    "in place projection adam": {
        "learnable_codebook": True,
        "ema_update": False,
        "codebook_dim": 5,
        "in_place_codebook_optimizer": partial(torch.optim.Adam, lr=0.01),
    },
    "in place heads": {
        "learnable_codebook": True,
        "ema_update": False,
        "heads": 2,
        "codebook_dim": 6,
        "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=5.0),
        "commitment_use_cross_entropy_loss": True,
    },
    "in place manual affine": {
        "learnable_codebook": True,
        "ema_update": False,
        "affine_param": True,
        "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=5.0),
        "manual_in_place_optimizer_update": True,
    },
    "in place bridge": {
        "vq_bridge": "linear",
        "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.5),
    },
}


def pair(**options):
    """The same layer twice: the same seed gives the same parameters and codes."""
    layers = []
    for make in (partial(upstream.VectorQuantize, dim=DIM, codebook_size=SIZE), partial(VectorQuantize, DIM, SIZE)):
        torch.manual_seed(5)
        given = dict(options)
        if "vq_bridge" in given:
            given["vq_bridge"] = torch.nn.Linear(given.get("codebook_dim", DIM), given.get("codebook_dim", DIM))
        layers.append(make(**given))
    return layers


def clear_layers(**options):
    """A pair, and what makes batches of it: rows close to a code, so that rounding decides no index."""
    theirs, ours = pair(**options)
    torch.manual_seed(2)
    shape = theirs._codebook.embed.shape
    codes = torch.randn(shape) * 2
    if options.get("use_cosine_sim"):
        codes = torch.nn.functional.normalize(codes, dim=-1)
    for layer in (theirs, ours):
        layer._codebook.embed.data.copy_(codes)
        layer._codebook.embed_avg.copy_(codes)
    return theirs, ours


def batch_of(layer, shape=(BATCH, LENGTH)):
    """x (*shape, DIM) whose projected heads lie near codes."""
    heads, codebook = layer.heads, layer._codebook.embed.detach()
    book = codebook.expand(heads, *codebook.shape[1:]) if codebook.shape[0] == 1 else codebook
    indices = torch.randint(SIZE, (*shape, heads))
    rows = torch.stack([book[head][indices[..., head]] for head in range(heads)], -2).flatten(-2)
    rows = rows + 0.02 * torch.randn(rows.shape)
    if isinstance(layer.project_in, torch.nn.Linear):  # least squares takes rows back through the map
        weight, bias = layer.project_in.weight.detach(), layer.project_in.bias.detach()
        return (rows - bias) @ torch.linalg.pinv(weight).T
    return rows if rows.shape[-1] == DIM else torch.randn(*shape, DIM) * 2


def run(layer, x, input_grad, training=True, **arguments):
    """Outputs, gradients by name, and state, after one call and one backward pass."""
    layer.train(training)
    layer.zero_grad()
    x = x.clone().requires_grad_(input_grad)
    torch.manual_seed(17)
    results = layer(x, **arguments)
    floats = [tensor for tensor in results[:1] if tensor.requires_grad]
    total = sum((tensor * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)).sum() for tensor in floats)
    loss = results[-1] if len(results) == 2 else results[2]
    total = total + 10 * loss.sum()
    if total.requires_grad:
        total.backward()
    gradients = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    return results, gradients, state


def assert_same(ours, theirs, what):
    """Two results of `run`; a gradient that is missing is one of zeros."""
    assert len(ours[0]) == len(theirs[0])
    for number, (one, two) in enumerate(zip(ours[0], theirs[0], strict=True)):
        if isinstance(two, tuple):
            assert one._fields == two._fields
            for name, mine, other in zip(two._fields, one, two, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{what} {n}: {m}")
            continue
        assert (one.shape, one.dtype) == (two.shape, two.dtype), (what, number)
        torch.testing.assert_close(one, two, rtol=2e-4, atol=1e-4, msg=lambda m, n=number: f"{what} result {n}: {m}")
    assert ours[1].keys() == theirs[1].keys()
    for name, two in theirs[1].items():
        one = ours[1][name]
        one, two = (torch.zeros(()) if gradient is None else gradient for gradient in (one, two))
        one, two = torch.broadcast_tensors(one, two)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{what} gradient of {n}: {m}")
    assert ours[2].keys() == theirs[2].keys(), what
    for name, two in theirs[2].items():
        torch.testing.assert_close(
            ours[2][name], two, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{what} state {n}: {m}"
        )


@pytest.mark.parametrize("case", SEQUENCES)
@pytest.mark.parametrize("input_grad", [True, False])
def test_training_steps_and_eval(case, input_grad):
    theirs, ours = clear_layers(**SEQUENCES[case])
    for step in range(3):
        x = batch_of(theirs)
        results = [run(layer, x, input_grad, return_loss_breakdown=True) for layer in (ours, theirs)]
        assert_same(*results, f"step {step}")
    if "affine_param" not in SEQUENCES[case]:
        x = batch_of(theirs)
        assert_same(*(run(layer, x, input_grad, training=False) for layer in (ours, theirs)), "eval")
