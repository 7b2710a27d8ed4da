"""Parity of the residual stacks with vector-quantize-pytorch itself, where it is installed."""

from __future__ import annotations

import random

import pytest
import torch
from torch.optim import SGD

from ferrovae import nn
from ferrovae.nn.quantizers import quantizer_dropout

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

DIM, SIZE, STAGES = 12, 8, 3

# Every option beside a few others.
CASES = {
    "default": {},
    "straight through": {"rotation_trick": False, "commitment_weight": 0.25, "decay": 0.5},
    "projected": {"codebook_dim": 5, "eps": 1e-3},
    "sizes": {"num_quantizers": None, "codebook_size": (8, 16, 12)},
    "shared": {"shared_codebook": True},
    "shared, projected": {"shared_codebook": True, "codebook_dim": 6, "rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "cosine, shared": {"use_cosine_sim": True, "shared_codebook": True, "rotation_trick": False},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable, sync_update_v": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3},
    "fixed": {"ema_update": False},
    "gradient of the residual": {"quant_grad_frac": 0.5},
    "gradient of the residual, learnable": {"quant_grad_frac": 1.0, "learnable_codebook": True, "ema_update": False},
    "affine": {"affine_param": True},
    "implicit": {"implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 9, "depth": 2}},
    "implicit, projected": {"implicit_neural_codebook": True, "codebook_dim": 5, "quant_grad_frac": 0.2},
    "in place": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": lambda parameters: SGD(parameters, 0.1),
    },
    "cross-entropy": {"commitment_use_cross_entropy_loss": True, "ema_update": False},
    "diversity": {"codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 1.0, "ema_update": False},
    "orthogonal": {"orthogonal_reg_weight": 0.5},
    "orthogonal, active": {"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True},
    "padding as it came": {"return_zeros_for_masked_padding": False},
    "manual": {"manual_ema_update": True},
    "diveq": {"diveq": True},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1e-9},
    "soft": {"straight_through": True, "rotation_trick": False, "codebook_dim": 5, "sample_codebook_temp": 0.5},
}
# Where the right value is another, and why; their cases are compared without what differs.
DIFFERENT = {
    ("cosine", "mask"): "upstream takes the loss of a masked batch on vectors that are not normalized",
    ("cosine, shared", "mask"): "as above",
    ("diversity", "mask"): "upstream takes padding for data",
    ("orthogonal", "*"): "upstream's is of codes after a stage's step; here, as every other term, before the stack's",
    ("orthogonal, active", "*"): "as above",
    ("hierarchy orthogonal", "gradient"): "upstream's is at the codes after all levels' steps, its loss before",
    ("affine", "codes"): "upstream decodes the codes as stored, not as moved to where the data lie",
    ("affine", "eval"): "upstream's affine moments move in eval mode",
    ("beam", "state"): "upstream takes the wrong axis of the residuals, and moves the first stage's codebook only",
    ("*", "codes"): "upstream decodes with the codebook after the step, not with the codes it used",
    ("*", "image"): "upstream raises on image maps unless the width is dim",
    ("*", "indices"): "upstream raises: it unpacks three results of two",
    ("*", "freeze_codebook"): "upstream's default of forward overrides the constructor's True",
    ("diveq", "eval"): "upstream adds noise in eval mode, so indices do not decode to the output",
}


def pair(**options):
    """The same layer twice: the second starts from the first's state."""
    options = {"dim": DIM, "num_quantizers": STAGES, "codebook_size": SIZE, **options}
    torch.manual_seed(5)
    theirs = upstream.ResidualVQ(**options)
    ours = nn.ResidualVQ(**options)
    with torch.no_grad():
        for scale, layer in enumerate(theirs.layers):
            # Stages of clearly smaller scale leave clear margins.
            layer._codebook.embed.copy_(torch.randn_like(layer._codebook.embed) * 0.4**scale)
            if options.get("use_cosine_sim"):
                layer._codebook.embed.copy_(torch.nn.functional.normalize(layer._codebook.embed, dim=-1))
            layer._codebook.embed_avg.copy_(layer._codebook.embed)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def clear(layer, x, margin=1e-4):
    """Replace the rows that a rounding could decide: the float64 margin between the two nearest codes is too small."""
    z = layer.project_in(x).detach().double().reshape(-1, layer.codebook_dim)
    bad = torch.zeros(len(z), dtype=torch.bool)
    for stage in layer.layers:
        codes = stage._codebook.embed[0].detach().double()
        rows = torch.nn.functional.normalize(z, dim=-1) if stage.use_cosine_sim else z
        near = torch.cdist(rows, codes).topk(2, largest=False)
        bad |= near.values[:, 1] - near.values[:, 0] < margin
        z = z - codes[near.indices[:, 0]]
    flat = x.reshape(-1, x.shape[-1])
    return torch.where(bad[:, None], flat[~bad][0], flat).reshape(x.shape)


def step(layer, x, **call):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    quantized, indices, losses = layer(x, **call)
    ((quantized * torch.linspace(-1, 1, quantized.shape[-1])).sum() + 10 * losses.sum()).backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return quantized, indices, losses, x.grad, grads


def close(one, two, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 2e-5, **tolerance}
    torch.testing.assert_close(one, two, **tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_five_training_steps_and_eval(case, masked):
    theirs, ours = pair(**CASES[case])
    plain = case.startswith(("cosine", "affine", "implicit", "in place", "dire"))
    for number in range(5):
        x = torch.randn(2, 15, DIM)
        x = x if plain else clear(theirs, x)
        call = {"mask": torch.rand(2, 15) > 0.3} if masked else {}
        torch.manual_seed(number)
        one = step(theirs, x, **call)
        torch.manual_seed(number)
        two = step(ours, x, **call)
        assert torch.equal(two[1], one[1])
        close(two[0], one[0])
        same = (case, "*") not in DIFFERENT and ((case, "mask") not in DIFFERENT or not masked)
        if same:
            close(two[2], one[2])
            close(two[3], one[3])
        elif "rotation_trick" not in CASES[case]:
            assert not torch.allclose(two[2], one[2])
        for name, grad in one[4].items():
            absent = torch.zeros(())
            grads = (absent if two[4][name] is None else two[4][name], absent if grad is None else grad)
            if same:
                close(*torch.broadcast_tensors(*grads), atol=1e-4)
        close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-3, atol=1e-4)
        theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.eval()
    ours.eval()
    if (case, "eval") in DIFFERENT:
        return
    x = torch.randn(2, 15, DIM)
    for one, two in zip(ours(x, return_all_codes=True), theirs(x, return_all_codes=True), strict=True):
        close(one, two)
        assert one.dtype == two.dtype
    indices = ours(x)[1]
    close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))
    close(ours.codebooks, theirs.codebooks)


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"codebook_dim": 5}, {"use_cosine_sim": True}])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_quantizer_dropout_of_the_same_draw(options, last, monkeypatch):
    theirs, ours = pair(quantize_dropout=True, **options)
    monkeypatch.setattr(random.Random, "randrange", lambda self, low, high: last)
    monkeypatch.setattr(quantizer_dropout, "draw_last_stage", lambda low, high, **rest: torch.tensor(last))
    for _ in range(3):
        x = torch.randn(2, 15, DIM)
        for one, two in zip(step(ours, x), step(theirs, x), strict=True):
            close(one, two)
        close(dict(ours.state_dict()), dict(theirs.state_dict()))
    coarse = torch.randint(SIZE, (2, 15, last + 1))
    close(ours.get_output_from_indices(coarse), theirs.get_output_from_indices(coarse))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
@pytest.mark.parametrize("masked", [False, True])
def test_beam_search(training, weights, masked):
    options = {"beam_size": 3, "beam_score_quantizer_weights": weights}
    theirs, ours = pair(**options)
    theirs.train(training)
    ours.train(training)
    x = clear(theirs, torch.randn(2, 15, DIM))
    call = {"mask": torch.rand(2, 15) > 0.3} if masked else {}
    if training:
        results = step(ours, x, **call), step(theirs, x, **call)
    else:
        results = ours(x, **call), theirs(x, **call)
    for one, two in zip(*results, strict=True):
        close(one, two)
    if training:
        first, *rest = [f"layers.{stage}._codebook.cluster_size" for stage in range(STAGES)]
        close(ours.state_dict()[first], theirs.state_dict()[first])
        for stage, name in enumerate(rest, 1):
            found = results[0][1][..., stage]
            counts = torch.bincount(found[found >= 0], minlength=SIZE).float()
            close(ours.state_dict()[name][0], 0.8 + 0.2 * counts)
            assert torch.equal(theirs.state_dict()[name], torch.ones(1, SIZE))


def test_grouped():
    options = {"dim": DIM, "groups": 2, "num_quantizers": 2, "codebook_size": SIZE}
    theirs, ours = upstream.GroupedResidualVQ(**options), nn.GroupedResidualVQ(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for number in range(3):
        x, mask = torch.randn(2, 15, DIM), torch.rand(2, 15) > 0.3
        call = {"mask": mask} if number else {}
        for one, two in zip(step(ours, x, **call), step(theirs, x, **call), strict=True):
            close(one, two)
        close(dict(ours.state_dict()), dict(theirs.state_dict()))
    theirs.eval()
    ours.eval()
    for one, two in zip(ours(x, return_all_codes=True), theirs(x, return_all_codes=True), strict=True):
        close(one, two)
    indices = ours(x)[1]
    close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))


def test_sampled_codes_of_one_draw():
    """Where one code holds all the probability, any draw is the nearest: sampling changes nothing else."""
    theirs, ours = pair(stochastic_sample_codes=True, sample_codebook_temp=1e-6)
    x = clear(theirs, torch.randn(2, 15, DIM), margin=1e-3)
    for one, two in zip(step(ours, x), step(theirs, x), strict=True):
        close(one, two)
    close(dict(ours.state_dict()), dict(theirs.state_dict()))
    warm = torch.stack([ours(x, sample_codebook_temp=1.0, freeze_codebook=True)[1] for _ in range(4)])
    assert (warm != warm[0]).any()


def test_what_upstream_gets_wrong():
    """The differences that are cheap to show."""
    images = upstream.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=SIZE, accept_image_fmap=True)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        images(torch.randn(2, DIM, 4, 5))
    theirs, ours = pair()
    with pytest.raises(ValueError, match="not enough values to unpack"):
        theirs(torch.randn(2, 15, DIM), indices=torch.zeros(2, 15, STAGES, dtype=torch.int64))
    theirs, ours = pair(freeze_codebook=True)
    before = ours.codebooks.clone()
    x = torch.randn(2, 15, DIM)
    theirs(x)
    ours(x)
    assert torch.equal(ours.codebooks, before)
    assert not torch.equal(theirs.codebooks, before)
    theirs, ours = pair()
    for layer, right in ((theirs, False), (ours, True)):
        quantized, _, _, codes = layer(x, return_all_codes=True)
        assert torch.allclose(codes.sum(0), quantized, atol=1e-5) == right
    theirs, ours = pair(diveq=True)
    for layer, right in ((theirs.eval(), False), (ours.eval(), True)):
        quantized, indices, _ = layer(x)
        assert torch.allclose(layer.get_output_from_indices(indices), quantized, atol=1e-5) == right
