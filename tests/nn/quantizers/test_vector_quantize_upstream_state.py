"""Parity with vector-quantize-pytorch itself: dead codes, k-means, layouts, checkpoints, methods."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae.nn import VectorQuantize
from ferrovae.nn.quantizers.keyed_sampling import head_keys, key_of, stratified_rows
from nn.quantizers.upstream_parity import assert_same, batch_of, clear_layers, mask_of, pair, run, upstream_module
from nn.quantizers.vector_quantize_cases import BATCH, DIM, LENGTH, SEQUENCES, SIZE

REPLACED = {
    "default": {"threshold_ema_dead_code": 2.2, "decay": 0.5},
    "cosine": {"threshold_ema_dead_code": 2.2, "decay": 0.5, "use_cosine_sim": True},
    "separate": {
        "threshold_ema_dead_code": 2.2,
        "decay": 0.5,
        "heads": 2,
        "codebook_dim": 6,
        "separate_codebook_per_head": True,
    },
    "shared heads": {"threshold_ema_dead_code": 2.2, "decay": 0.5, "heads": 2, "codebook_dim": 6},
    "learnable": {"threshold_ema_dead_code": 1.1, "learnable_codebook": True, "ema_update": False},
    "directional": {"threshold_ema_dead_code": 1.1, "directional_reparam": True},
}


@pytest.mark.parametrize("case", REPLACED)
@pytest.mark.parametrize("masked", [False, True])
def test_dead_codes_are_replaced_alike_by_the_same_rows(monkeypatch, case, masked):
    """Theirs is handed the rows that ours chose; that these are rows of the batch is the codebook's own test."""
    theirs, ours = clear_layers(**REPLACED[case])
    chosen = []
    monkeypatch.setattr(upstream_module, "sample_vectors", lambda samples, num: chosen.pop(0)[:num])
    mask = mask_of(None) if masked and case in ("default", "learnable") else None
    for step in range(3):
        x = batch_of(theirs)[:, : LENGTH // (1 if mask is not None else 2)]
        first = run(ours, x, True, mask=mask)
        book = ours._codebook
        fresh = book.cluster_size == book.options.threshold_ema_dead_code
        assert step > 0 or fresh.any()
        chosen[:] = [codes[dead] for codes, dead in zip(book.embed.detach().clone(), fresh, strict=True) if dead.any()]
        assert_same(first, run(theirs, x, True, mask=mask), f"step {step}")
        assert not chosen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cosine_sim": True},
        {"heads": 2, "codebook_dim": 6, "separate_codebook_per_head": True, "kmeans_iters": 3},
        {"learnable_codebook": True, "ema_update": False, "codebook_dim": 5},
        {"affine_param": True},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_kmeans_starts_alike_from_the_same_rows(monkeypatch, options, training):
    if "affine_param" in options and not training:
        options = {"decay": 0.3}  # affine statistics stand still in eval mode
    theirs, ours = pair(kmeans_init=True, **options)
    heads = theirs._codebook.num_codebooks
    keys = list(head_keys(key_of(ours._codebook.cluster_size), heads))

    def same_rows(samples, num):
        valid = torch.ones(samples.shape[0], dtype=torch.bool)
        total = samples.shape[0]
        return samples[stratified_rows(valid, num, keys.pop(0), offset=0, total=total, distinct=False)[0]]

    monkeypatch.setattr(upstream_module, "sample_vectors", same_rows)
    x = torch.randn(BATCH, LENGTH, DIM)
    assert_same(*(run(layer, x, True, training) for layer in (ours, theirs)), "first batch")
    assert not keys


LAYOUTS = {
    "single": ({}, (7, DIM)),
    "single heads": ({"heads": 3, "codebook_dim": 4}, (7, DIM)),
    "single separate": ({"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True}, (7, DIM)),
    "single channel first": ({"channel_last": False, "codebook_dim": 5}, (7, DIM)),
    "channel first": ({"channel_last": False}, (2, DIM, 9)),
    "channel first heads": ({"channel_last": False, "heads": 2, "codebook_dim": 5}, (2, DIM, 9)),
    "image": ({"accept_image_fmap": True}, (2, DIM, 3, 4)),
    "image projection": ({"accept_image_fmap": True, "codebook_dim": 5}, (2, DIM, 3, 4)),
    "image heads": ({"accept_image_fmap": True, "heads": 3, "codebook_dim": 4}, (2, DIM, 3, 4)),
    "image separate diversity": (
        {
            "accept_image_fmap": True,
            "codebook_diversity_loss_weight": 1.0,
            "codebook_diversity_temperature": 0.5,
            "freeze_codebook": True,
        },
        (2, DIM, 3, 4),
    ),
    "volume": ({"accept_3d_fmap": True}, (2, DIM, 2, 3, 4)),
    "volume separate": (
        {"accept_3d_fmap": True, "heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
        (2, DIM, 2, 3, 4),
    ),
    "empty": ({"commitment_weight": 0.0}, (2, 0, DIM)),
}
TOPK_LAYOUTS = ["single", "single channel first", "channel first", "image", "volume"]


@pytest.mark.parametrize(("case", "topk"), [(case, None) for case in LAYOUTS] + [(case, 3) for case in TOPK_LAYOUTS])
@pytest.mark.parametrize("training", [True, False])
def test_layouts(case, topk, training):
    options, shape = LAYOUTS[case]
    theirs, ours = clear_layers(**options)
    x = torch.randn(shape)
    given = {} if topk is None else {"topk": topk}
    both = [run(layer, x, True, training, **given) for layer in (ours, theirs)]
    assert_same(*both, case)


@pytest.mark.parametrize("case", TOPK_LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_the_terms_of_topk_are_those_of_tokens(case, training):
    options, shape = LAYOUTS[case]
    theirs, ours = clear_layers(**options)
    x = torch.randn(shape)
    both = [run(layer, x, True, training, topk=3, return_loss_breakdown=True) for layer in (ours, theirs)]
    assert_same(*both, case)


CHECKPOINTS = {
    **{name: SEQUENCES[name] for name in ("default", "layernorm", "learnable", "orthogonal", "separate", "bridge")},
    "k-means": {"kmeans_init": True},
    "affine": {"affine_param": True},
    "everything": {
        "affine_param": True,
        "vq_bridge": "linear",
        "heads": 2,
        "codebook_dim": 5,
        "separate_codebook_per_head": True,
        "layernorm_after_project_in": True,
        "orthogonal_reg_weight": 1.0,
        "kmeans_init": True,
    },
}


@pytest.mark.parametrize("case", CHECKPOINTS)
@pytest.mark.parametrize("trained", [True, False])
def test_checkpoints_load_both_ways(case, trained):
    options = CHECKPOINTS[case]
    theirs, ours = pair(**options)
    x = torch.randn(4, 30, DIM)
    if trained:
        theirs(x)
        ours(x + 1)
    else:
        assert {name: value.shape for name, value in ours.state_dict().items()} == {
            name: value.shape for name, value in theirs.state_dict().items()
        }
    for source, target in ((theirs, pair(**options)[1]), (ours, pair(**options)[0])):
        if "affine_param" in options and trained and target.__class__ is not VectorQuantize:
            target(x)  # upstream's takes no batch moments before it has its own
        target.load_state_dict(source.state_dict(), strict=True)
        if not trained:
            continue
        assert target.state_dict().keys() == source.state_dict().keys()
        if "affine_param" in options:
            continue  # upstream's moments move in eval mode
        for one, two in zip(source.eval()(x), target.eval()(x), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


METHODS = {
    "default": ({}, (BATCH, LENGTH, DIM)),
    "projection": ({"codebook_dim": 5}, (BATCH, LENGTH, DIM)),
    "cosine separate": (
        {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True, "use_cosine_sim": True},
        (BATCH, LENGTH, DIM),
    ),
    "channel first": ({"channel_last": False}, (BATCH, DIM, LENGTH)),
    "image": ({"accept_image_fmap": True, "threshold_ema_dead_code": 1e-9}, (2, DIM, 3, 4)),
    "heads": ({"heads": 3, "codebook_dim": 4}, (BATCH, LENGTH, DIM)),
    "single": ({}, (7, DIM)),
}


@pytest.mark.parametrize("case", METHODS)
def test_methods(case):
    options, shape = METHODS[case]
    theirs, ours = clear_layers(**options)
    assert ours.ema_update == theirs.ema_update
    assert ours.codebook.shape == theirs.codebook.shape
    x = torch.randn(shape)
    indices = torch.randint(SIZE, ours(x, freeze_codebook=True)[1].shape)
    for name in ("update_indices", "update_ema_indices"):
        for layer in (theirs, ours):
            getattr(layer, name)(x, indices)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-4)
    if "image" not in case and "single" not in case and "channel" not in case:
        tokens = torch.randn(2, 3, ours.heads * ours.codebook_dim)
        split = [layer.maybe_split_heads_from_input(tokens) for layer in (ours, theirs)]
        assert torch.equal(*split)
    if case not in ("heads",):  # see DIFFERENT
        codes = [layer.get_codes_from_indices(indices) for layer in (ours, theirs)]
        torch.testing.assert_close(*codes, rtol=1e-4, atol=1e-5)
        outputs = [layer.get_output_from_indices(indices) for layer in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    new = torch.randn(ours.codebook.shape)
    for layer in (ours, theirs):
        layer.codebook = new
    assert torch.equal(ours._codebook.embed, theirs._codebook.embed)


def test_the_manual_steps_of_a_codebook():
    theirs, ours = clear_layers(manual_ema_update=True)
    x = batch_of(theirs)
    for layer in (theirs, ours):
        layer(x)
        layer._codebook.update_ema()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-4)
    optimizer = partial(torch.optim.SGD, lr=5.0)
    theirs, ours = clear_layers(
        learnable_codebook=True,
        ema_update=False,
        in_place_codebook_optimizer=optimizer,
        manual_in_place_optimizer_update=True,
    )
    before = ours.codebook.detach().clone()
    for layer in (theirs, ours):
        layer(x)
        layer(x)
    assert torch.equal(ours.codebook, before)
    for layer in (theirs, ours):
        layer.update_in_place_optimizer()
    assert not torch.equal(ours.codebook, before)
    torch.testing.assert_close(ours.codebook, theirs.codebook, rtol=1e-4, atol=1e-5)
    assert ours._codebook.embed.grad is None
