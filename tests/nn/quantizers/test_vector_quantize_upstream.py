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
from ferrovae.nn.quantizers.keyed_sampling import head_keys, key_of, stratified_rows
from ferrovae.ops import _checks, _philox

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
    "affine_param with in_place_codebook_optimizer": "the statistics move once a step, upstream's twice",
    "affine_param with dead codes": "a code becomes the row as the lookup sees it, upstream stores the row unmoved",
    "indices= with heads, projection or feature maps": "upstream returns the vectors before they are put together",
    "decoding with shared heads, projected maps, affine_param, vq_bridge": "upstream's is not what forward gave",
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
    "in place manual": {
        "learnable_codebook": True,
        "ema_update": False,
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
    rows = rows + (0.05 if layer.use_cosine_sim else 0.2) * torch.randn(rows.shape)
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


def mask_of(x):
    return torch.arange(LENGTH) < torch.tensor([LENGTH, 7, 12])[:, None]


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

    monkeypatch.setattr(theirs_module, "gumbel_noise", same_noise)
    theirs, ours = clear_layers(stochastic_sample_codes=True, **STOCHASTIC[case])
    x = torch.randn(BATCH, LENGTH, DIM)
    both = [run(layer, x, case != "soft", training, sample_codebook_temp=temperature) for layer in (ours, theirs)]
    assert_same(*both, case)


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
    monkeypatch.setattr(theirs_module, "sample_vectors", lambda samples, num: chosen.pop(0)[:num])
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

    monkeypatch.setattr(theirs_module, "sample_vectors", same_rows)
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
