"""Parity with vector-quantize-pytorch itself: training steps, arguments of a call, drawn codes.

Every case is a dict of options, run for several training steps and then in eval mode: outputs, losses, gradients of
the input and of all parameters, and the state. Where the right value is another, see `vector_quantize_cases.DIFFERENT`
and `test_vector_quantize_defects.py`.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae.ops import _checks, _philox
from nn.quantizers.upstream_parity import (
    assert_same,
    batch_of,
    clear_layers,
    mask_of,
    pair,
    parted_rows,
    run,
    upstream_module,
)
from nn.quantizers.vector_quantize_cases import BATCH, DIM, LENGTH, SEQUENCES, SIZE


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


CALLS = {
    "mask": ({}, {"mask": mask_of}),
    "mask kept": ({"return_zeros_for_masked_padding": False}, {"mask": mask_of}),
    "lens": ({"decay": 0.5}, {"lens": lambda x: torch.tensor([LENGTH, 7, 12])}),
    "lens learnable": (
        {"learnable_codebook": True, "ema_update": False, "return_zeros_for_masked_padding": False},
        {"lens": lambda x: torch.tensor([3, 0, 12])},
    ),
    "mask affine": ({"affine_param": True}, {"mask": mask_of}),
    "mask in place": (
        {
            "learnable_codebook": True,
            "ema_update": False,
            "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=5.0),
        },
        {"mask": mask_of},
    ),
    "mask cross-entropy heads": (
        {"heads": 2, "codebook_dim": 6, "commitment_use_cross_entropy_loss": True, "freeze_codebook": True},
        {"mask": mask_of},
    ),
    "freeze": ({}, {"freeze_codebook": True}),
    "thaw": ({"freeze_codebook": True}, {"freeze_codebook": False}),
    "ema off": ({}, {"ema_update": False}),
    "ema on": ({"ema_update": False}, {"ema_update": True}),
    "weight by code": ({}, {"ema_update_weight": lambda x: torch.linspace(0, 1, SIZE)}),
    "weight by head and code": (
        {"heads": 2, "codebook_dim": 6, "separate_codebook_per_head": True},
        {"ema_update_weight": lambda x: torch.linspace(0, 1, 2 * SIZE).view(2, SIZE)},
    ),
    "weight function": ({}, {"ema_update_weight": lambda x: lambda sums, counts: (counts > 2).float()}),
    "topk": ({}, {"topk": 3}),
    "topk one": ({"use_cosine_sim": True, "codebook_dim": 5}, {"topk": 1}),
    "topk more than there are": ({"rotation_trick": False, "commitment_weight": 0.5}, {"topk": 99}),
    "topk mask": ({}, {"topk": 2, "mask": mask_of}),
    "topk learnable": ({"learnable_codebook": True, "ema_update": False, "codebook_dim": 5}, {"topk": 4}),
    "topk no commitment": ({"commitment_weight": 0.0, "codebook_diversity_loss_weight": 0.0}, {"topk": 4}),
    "topk orthogonal": ({"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True}, {"topk": 2}),
    "topk directional": ({"directional_reparam": True, "threshold_ema_dead_code": 1e-9}, {"topk": 2}),
    "cross-entropy of indices": (
        {"freeze_codebook": True},
        {"indices": lambda x: torch.randint(-1, SIZE, x.shape[:2])},
    ),
    "cross-entropy of indices cosine": (
        {"freeze_codebook": True, "use_cosine_sim": True},
        {"indices": lambda x: torch.randint(-1, SIZE, x.shape[:2])},
    ),
    "cross-entropy of indices learnable": (
        {"learnable_codebook": True, "ema_update": False},
        {"indices": lambda x: torch.randint(-1, SIZE, x.shape[:2])},
    ),
    "transform": (
        {"learnable_codebook": True, "ema_update": False},
        {"codebook_transform_fn": lambda x: partial(moved_codes, condition=x.detach())},
    ),
    "transform cosine": (
        {"use_cosine_sim": True, "freeze_codebook": True},
        {"codebook_transform_fn": lambda x: partial(moved_codes, condition=x.detach())},
    ),
    "transform separate cross-entropy": (
        {
            "heads": 2,
            "codebook_dim": 6,
            "separate_codebook_per_head": True,
            "learnable_codebook": True,
            "ema_update": False,
            "commitment_use_cross_entropy_loss": True,
        },
        {"codebook_transform_fn": lambda x: partial(moved_codes, condition=x.detach()[..., :6])},
    ),
    "transform topk": (
        {"learnable_codebook": True, "ema_update": False},
        {"codebook_transform_fn": lambda x: partial(moved_codes, condition=x.detach()), "topk": 3},
    ),
    "transform diversity": (
        {
            "learnable_codebook": True,
            "ema_update": False,
            "codebook_diversity_loss_weight": 0.5,
            "codebook_diversity_temperature": 1.0,
        },
        {"codebook_transform_fn": lambda x: partial(moved_codes, condition=x.detach())},
    ),
    "transform soft": (
        {
            "straight_through": True,
            "rotation_trick": False,
            "route_gradients_to_input": False,
            "freeze_codebook": True,
            "orthogonal_reg_weight": 0.1,
        },
        {"codebook_transform_fn": lambda x: partial(moved_codes, condition=x.detach())},
    ),
}


def moved_codes(codes, condition):
    """(H, K, D) and (B, N, D) -> (H, B, N, K, D)."""
    return codes[:, None, None] + 0.3 * torch.tanh(condition)[None, :, :, None] * codes[:, None, None].sin()


@pytest.mark.parametrize(
    ("case", "training"),
    [(case, training) for case in CALLS for training in (True, False) if training or case != "mask affine"],
)
def test_arguments_of_a_call(case, training):
    options, arguments = CALLS[case]
    theirs, ours = clear_layers(**options)
    for step in range(2):
        x = batch_of(theirs)
        given = {name: value(x) if callable(value) else value for name, value in arguments.items()}
        both = [run(layer, x, True, training, **given) for layer in (ours, theirs)]
        assert_same(*both, f"step {step}")


def test_accumulated_statistics_are_applied_by_the_next_step():
    theirs, ours = clear_layers(decay=0.7)
    for accumulate in (True, True, False, True, False):
        x = batch_of(theirs)
        weight = None if accumulate else torch.linspace(0.5, 1, SIZE)
        assert_same(
            *(run(layer, x, True, accum_ema_update=accumulate, ema_update_weight=weight) for layer in (ours, theirs)),
            f"accumulate {accumulate}",
        )


STOCHASTIC = {
    "default": {},
    "cold": {"sample_codebook_temp": 0.1},
    "cosine": {"use_cosine_sim": True, "sample_codebook_temp": 0.3},
    "separate": {"heads": 2, "codebook_dim": 6, "separate_codebook_per_head": True},
    "soft": {"straight_through": True, "rotation_trick": False, "codebook_dim": 5, "freeze_codebook": True},
    "zero": {"sample_codebook_temp": 0.0},
}


@pytest.mark.parametrize("case", STOCHASTIC)
@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("training", [True, False])
def test_drawn_codes_are_theirs_under_the_same_noise(monkeypatch, case, temperature, training):
    def same_noise(scores):
        seed = _checks.seed("noise", None, None, scores.device)
        return torch.stack(
            [
                _philox.gumbels(seed, torch.arange(scores.shape[1]), head, scores.shape[2])
                for head in range(scores.shape[0])
            ]
        )

    monkeypatch.setattr(upstream_module, "gumbel_noise", same_noise)
    theirs, ours = clear_layers(stochastic_sample_codes=True, **STOCHASTIC[case])
    x = torch.randn(BATCH, LENGTH, DIM)
    both = [run(layer, x, case != "soft", training, sample_codebook_temp=temperature) for layer in (ours, theirs)]
    assert_same(*both, case)


UNCLEAR = {
    "default": {},
    "projection": {"codebook_dim": 5},
    "cosine": {"use_cosine_sim": True},
    "heads": {"heads": 3, "codebook_dim": 4},
    "separate": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
    "separate cosine": {"heads": 2, "codebook_dim": 6, "separate_codebook_per_head": True, "use_cosine_sim": True},
}


def parted_indices(case, training, offset):
    """How many of how many indices differ, where nothing keeps rows off the border of two codes."""
    options = UNCLEAR[case]
    theirs, ours = pair(**{"codebook_size": 512, **options})
    codes, x = torch.randn(theirs._codebook.embed.shape) + offset, torch.randn(2, 4096, DIM) + offset
    if options.get("use_cosine_sim"):
        codes = torch.nn.functional.normalize(codes, dim=-1)
    for layer in (theirs, ours):
        layer._codebook.embed.data.copy_(codes)
        layer.train(training)
    with torch.no_grad():
        rows = ours._rows(ours.project_in(x))
        found = [ours._heads.split_values(layer(x)[1]) for layer in (ours, theirs)]
    return parted_rows(*found, rows, codes, cosine=ours.use_cosine_sim), found[0].numel()


@pytest.mark.parametrize("case", UNCLEAR)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("offset", [0, 5])
def test_indices_differ_only_where_float32_cannot_tell(case, training, offset):
    """Less than one in a thousand, each inside upstream's own rounding error; offsets make that larger."""
    parted, of = parted_indices(case, training, offset)
    assert parted < 0.001 * of


def test_rounding_is_what_parts_them():
    parted, of = parted_indices("default", False, 100)
    assert 0.001 * of < parted < 0.5 * of


def test_a_wrong_index_is_not_taken_for_rounding():
    rows, codes = torch.randn(1, 50, DIM), torch.randn(1, SIZE, DIM)
    best = torch.cdist(rows, codes).argmin(-1)
    assert parted_rows(best, best, rows, codes) == 0
    for wrong in ((best, (best + 1) % SIZE), ((best + 1) % SIZE, best)):
        with pytest.raises(AssertionError):
            parted_rows(*wrong, rows, codes)
