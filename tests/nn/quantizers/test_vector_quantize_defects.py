"""Where vector-quantize-pytorch 1.32.0 is wrong: the right value, and that it gives another.

One test a line of `vector_quantize_cases.DIFFERENT`, and one a known defect.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae.nn import VectorQuantize
from nn.quantizers.upstream_parity import assert_same, batch_of, clear_layers, mask_of, pair, run, upstream
from nn.quantizers.vector_quantize_cases import BATCH, DIM, LENGTH, SIZE


def brute_force(x, codes):
    return (x.double()[..., None, :] - codes.double()).square().sum(-1).argmin(-1)


def loss_of(layer, x, **arguments):
    return layer(x, **arguments)[2]


@pytest.mark.parametrize(
    "options",
    [
        {"codebook_dim": 5},
        {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
        {"heads": 3, "codebook_dim": 4},
        {"use_cosine_sim": True},
        {"codebook_dim": 5, "use_cosine_sim": True},
        {"affine_param": True, "codebook_dim": 5},
    ],
)
def test_masked_tokens_leave_the_loss_of_the_visible(options):
    """Defects c and d."""
    theirs, ours = pair(**options)
    _, alone = pair(**options)
    visible = torch.randn(BATCH, LENGTH // 2, DIM)
    padded = torch.cat([visible, torch.randn(BATCH, LENGTH // 2, DIM)], 1)
    mask = torch.arange(LENGTH).expand(BATCH, LENGTH) < LENGTH // 2
    expected = loss_of(alone, visible)
    torch.testing.assert_close(loss_of(ours, padded, mask=mask), expected)
    torch.testing.assert_close(dict(ours.state_dict()), dict(alone.state_dict()))
    try:
        found = loss_of(theirs, padded, mask=mask)
    except (RuntimeError, UserWarning):  # that two shapes do not match
        return
    assert not torch.isclose(found, expected, rtol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 0.5, "commitment_weight": 0.0},
        {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True, "commitment_weight": 0.0},
        {
            "commitment_use_cross_entropy_loss": True,
            "orthogonal_reg_weight": 1.0,
            "orthogonal_reg_active_codes_only": True,
        },
    ],
)
def test_padding_takes_no_part_in_any_loss(options):
    theirs, ours = pair(freeze_codebook=True, **options)
    _, alone = pair(freeze_codebook=True, **options)
    codes = torch.randn(SIZE, DIM) * 2
    for layer in (theirs, ours, alone):
        layer._codebook.embed.data.copy_(codes)
    visible, padding = codes[:4].expand(BATCH, 4, DIM) + 0.1, codes[8:10].expand(BATCH, 2, DIM) + 0.1
    mask = torch.arange(6).expand(BATCH, 6) < 4
    expected = loss_of(alone, visible)
    torch.testing.assert_close(loss_of(ours, torch.cat([visible, padding], 1), mask=mask), expected)
    assert not torch.isclose(loss_of(theirs, torch.cat([visible, padding], 1), mask=mask), expected, rtol=1e-3)


def test_the_cross_entropy_of_given_indices_leaves_padding_out():
    theirs, ours = pair()
    x, indices, mask = torch.randn(BATCH, LENGTH, DIM), torch.randint(SIZE, (BATCH, LENGTH)), mask_of(None)
    logits = -torch.cdist(x.double(), ours.codebook.double())
    expected = torch.nn.functional.cross_entropy(logits[mask], indices[mask])
    torch.testing.assert_close(ours(x, indices=indices, mask=mask)[1].double(), expected, rtol=1e-5, atol=0)
    assert not torch.isclose(theirs(x, indices=indices, mask=mask)[1].double(), expected, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"commitment_use_cross_entropy_loss": True}])
def test_a_batch_that_is_all_masked_has_loss_zero(options):
    """Defect e."""
    theirs, ours = pair(**options)
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    x = torch.randn(BATCH, LENGTH, DIM)
    assert loss_of(ours, x, mask=mask) == 0
    assert loss_of(theirs, x, mask=mask).isnan()


def test_a_batch_of_nan_leaves_the_codebook_finite():
    """Defect e."""
    theirs, ours = pair()
    x = torch.randn(BATCH, LENGTH, DIM)
    x[0, 0, 0] = torch.nan
    for layer in (ours, theirs):
        layer(x)
        layer(torch.randn(BATCH, LENGTH, DIM))
    assert ours.codebook.isfinite().all()
    assert theirs.codebook.isnan().any()


def test_small_scales_find_the_nearest_code():
    """Defect g: it clamps squared distances at 1e-8."""
    theirs, ours = pair()
    x, codes = torch.randn(1, 500, DIM) * 1e-5, torch.randn(SIZE, DIM) * 1e-5
    for layer in (theirs.eval(), ours.eval()):
        layer.codebook = codes
    assert torch.equal(ours(x)[1], brute_force(x, codes))
    assert (theirs(x)[1] != brute_force(x, codes)).float().mean() > 0.5


def test_offsets_find_the_nearest_code():
    theirs, ours = pair()
    x, codes = torch.randn(1, 500, DIM) + 1000, torch.randn(SIZE, DIM) + 1000
    for layer in (theirs.eval(), ours.eval()):
        layer.codebook = codes
    assert torch.equal(ours(x)[1], brute_force(x, codes))
    assert (theirs(x)[1] != brute_force(x, codes)).float().mean() > 0.1


def test_autocast_changes_no_index():
    """Defect h: autocast on a CPU rounds its distances to bfloat16."""
    theirs, ours = pair()
    x, codes = torch.randn(1, 2000, DIM), torch.randn(SIZE, DIM)
    for layer in (theirs.eval(), ours.eval()):
        layer.codebook = codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x)[1], brute_force(x, codes))
        assert not torch.equal(theirs(x)[1], brute_force(x, codes))


def test_statistics_stay_float32_in_a_bfloat16_model():
    """Defect i: a moving average in bfloat16 stands still once its steps are below its precision."""
    theirs, ours = pair(decay=0.999)
    truth = pair(decay=0.999)[1].double()
    for layer in (theirs.bfloat16(), ours.bfloat16()):
        assert layer(torch.randn(1, 3, DIM, dtype=torch.bfloat16), freeze_codebook=True)[0].dtype == torch.bfloat16
    for _ in range(20):
        x = torch.randn(1, 64, DIM, dtype=torch.bfloat16)
        for layer in (theirs, ours):
            layer(x)
        truth(x.double())
    torch.testing.assert_close(ours._codebook.cluster_size, truth._codebook.cluster_size)
    assert (theirs._codebook.cluster_size.float() - truth._codebook.cluster_size).abs().max() > 1e-2


def test_affine_statistics_stand_still_in_eval_mode_and_when_frozen():
    """Defect n."""
    for training, frozen in ((False, False), (True, True)):
        theirs, ours = pair(affine_param=True)
        for layer in (theirs, ours):
            layer(torch.randn(BATCH, LENGTH, DIM))
            layer.train(training)
        before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        theirs_before = theirs._codebook.batch_mean.clone()
        for layer in (theirs, ours):
            layer(torch.randn(BATCH, LENGTH, DIM) + 9, freeze_codebook=frozen)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert not torch.equal(theirs._codebook.batch_mean, theirs_before)


def test_a_checkpoint_with_affine_statistics_loads_into_a_fresh_layer():
    """Defect n."""
    theirs, ours = pair(affine_param=True)
    fresh_theirs, fresh_ours = pair(affine_param=True)
    x = torch.randn(BATCH, LENGTH, DIM)
    for layer in (theirs, ours):
        layer(x)
    for state in (theirs.state_dict(), ours.state_dict()):
        fresh_ours.load_state_dict(state, strict=True)
        torch.testing.assert_close(dict(fresh_ours.state_dict()), dict(state))
        with pytest.raises(RuntimeError, match="batch_mean"):
            fresh_theirs.load_state_dict(state, strict=True)
    fresh_ours.load_state_dict(pair(affine_param=True)[0].state_dict(), strict=True)  # one that has none yet
    assert fresh_ours.eval()(x)[0].isfinite().all()


def test_affine_codes_that_die_become_rows_of_the_batch():
    theirs, ours = pair(affine_param=True, threshold_ema_dead_code=50, decay=0.5)
    x = torch.randn(1, 400, DIM) * 3 + 5
    found = []
    for layer in (theirs, ours):
        layer(x)
        layer.eval()
        codes = ours.get_codes_from_indices(torch.arange(SIZE)[None])[0] if layer is ours else None
        book = layer._codebook
        if codes is None:
            scale = (book.batch_variance / book.codebook_variance).sqrt()
            codes = ((book.embed - book.codebook_mean) * scale + book.batch_mean)[0]
        found.append(torch.cdist(codes, x[0]).amin(1) < 1e-2)
    assert found[1].sum() >= SIZE - 2
    assert found[0].sum() == 0


def test_affine_statistics_move_once_a_step_with_an_optimizer_in_place():
    options = {
        "affine_param": True,
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=1e-9),
        "affine_param_batch_decay": 0.5,
    }
    theirs, ours = pair(**options)
    first, second = torch.randn(2, 1, 50, DIM)
    for layer in (theirs, ours):
        layer(first)
        layer(second)
    expected = 0.5 * first.mean(1) + 0.5 * second.mean(1)
    torch.testing.assert_close(ours._codebook.batch_mean[0], expected)
    assert not torch.allclose(theirs._codebook.batch_mean[0], expected, atol=1e-3)


def test_the_loss_of_eval_mode_requires_no_gradient():
    """Defect o."""
    theirs, ours = pair()
    for layer in (theirs, ours):
        loss = loss_of(layer, torch.randn(1, 4, DIM))
        assert loss.requires_grad == (layer is theirs)  # which depends on nothing that could be learnt
        layer.eval()
    x = torch.randn(1, 4, DIM)
    assert not loss_of(ours, x).requires_grad
    assert loss_of(theirs, x).requires_grad
    assert loss_of(ours.train(), x.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"commitment_use_cross_entropy_loss": True},
        {"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 1.0, "commitment_weight": 0.0},
        {"commitment_use_cross_entropy_loss": True, "use_cosine_sim": True},
    ],
)
def test_gradients_are_those_of_the_codebook_before_its_step(options):
    """Defect p."""
    _, frozen = pair(freeze_codebook=True, **options)
    theirs, ours = pair(decay=0.1, **options)
    x = torch.randn(BATCH, LENGTH, DIM)
    gradients = []
    for layer in (frozen, ours, theirs):
        inputs = x.clone().requires_grad_()
        loss_of(layer, inputs).backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert (gradients[2] - gradients[0]).norm() > 0.1 * gradients[0].norm()


def test_diversity_of_separate_codebooks_is_each_ones_own():
    options = {
        "heads": 2,
        "codebook_dim": 6,
        "separate_codebook_per_head": True,
        "codebook_diversity_loss_weight": 1.0,
        "codebook_diversity_temperature": 2.0,
        "commitment_weight": 0.0,
        "freeze_codebook": True,
    }
    theirs, ours = pair(**options)
    x = torch.randn(BATCH, LENGTH, DIM)
    rows = x.double().unflatten(-1, (2, 6)).movedim(2, 0)
    books = ours.codebook.double()
    logits = -2 * torch.cdist(rows.flatten(1, 2), books).unflatten(1, (BATCH, LENGTH))
    expected = -torch.special.entr(logits.softmax(-1).mean(1)).sum(-1).mean()
    torch.testing.assert_close(loss_of(ours, x).double(), expected, rtol=1e-5, atol=0)
    assert not torch.isclose(loss_of(theirs, x).double(), expected, rtol=1e-4)


def test_active_codes_of_separate_codebooks():
    """Each head counts its own; upstream raises."""
    options = {"heads": 2, "codebook_dim": 6, "separate_codebook_per_head": True, "commitment_weight": 0.0}
    active = {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True}
    theirs, ours = pair(freeze_codebook=True, **options, **active)
    x = torch.randn(1, 5, DIM)
    _, indices, loss = ours(x)
    expected = []
    for book, used in zip(ours.codebook.double(), indices.unbind(-1), strict=True):
        codes = torch.nn.functional.normalize(book[used.unique()], dim=-1)
        expected.append((codes @ codes.T).square().mean() - 1 / len(codes))
    torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        theirs(x)


def test_soft_gradients_of_the_nearest_codes():
    """Every one of the k has the gradient that the nearest has without topk; upstream raises."""
    options = {"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False}
    theirs, ours = pair(freeze_codebook=True, commitment_weight=0.0, **options)
    x, gradients = torch.randn(BATCH, LENGTH, DIM), []
    for arguments in ({}, {"topk": 1}, {"topk": 3}):
        inputs = x.clone().requires_grad_()
        (ours(inputs, **arguments)[0] * torch.linspace(-1, 1, DIM)).sum().backward()
        gradients.append(inputs.grad / arguments.get("topk", 1))
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    with pytest.raises(RuntimeError):
        theirs(x, topk=3)


def test_diversity_is_an_entropy_however_small_the_probabilities():
    theirs, ours = (
        make(
            codebook_diversity_loss_weight=1.0,
            codebook_diversity_temperature=1e-3,
            commitment_weight=0.0,
            dim=2,
            codebook_size=200_000,
        )
        for make in (upstream.VectorQuantize, VectorQuantize)
    )
    x = torch.randn(1, 1, 2)
    expected = -torch.tensor(200_000.0).log()  # all codes alike, up to the temperature
    torch.testing.assert_close(loss_of(ours, x), expected, rtol=1e-3, atol=0)
    assert not torch.isclose(loss_of(theirs, x), expected, rtol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"codebook_dim": 5},
        {"heads": 3, "codebook_dim": 4},
        {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
        {"channel_last": False},
        {"accept_image_fmap": True},
        {"accept_3d_fmap": True, "heads": 3, "codebook_dim": 4},
    ],
)
def test_with_given_indices_the_vectors_come_out_as_ever(options):
    theirs, ours = pair(**options)
    shape = (2, DIM, 3, 4) if "accept_image_fmap" in options else (2, 6, DIM)
    shape = (2, DIM, 2, 3, 4) if "accept_3d_fmap" in options else shape
    shape = (2, DIM, 6) if "channel_last" in options else shape
    x = torch.randn(shape)
    quantized, indices, _ = ours.eval()(x)
    again, loss = ours(x, indices=indices)
    assert torch.equal(again, quantized)
    last = x if len(shape) == 3 and "channel_last" not in options else x.movedim(1, -1)
    rows = ours.project_in(last).unflatten(-1, (ours.heads, -1)).double()
    books = ours._codebook.embed.double().expand(ours.heads, -1, -1)
    logits = torch.stack([-torch.cdist(rows[..., h, :].flatten(0, -2), books[h]) for h in range(ours.heads)], 1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), indices.reshape(-1))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    try:
        their_quantized, _ = theirs.eval()(x, indices=indices)
    except RuntimeError:
        return
    assert their_quantized.shape != x.shape


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 3, "codebook_dim": 4},
        {"heads": 3, "codebook_dim": 5},
        {"accept_image_fmap": True, "codebook_dim": 5},
        {"channel_last": False, "codebook_dim": 5},
        {"affine_param": True},
        {"vq_bridge": True},
    ],
)
def test_decoding_gives_what_forward_gave(options):
    theirs, ours = pair(**options)
    first = "accept_image_fmap" in options or "channel_last" in options
    shape = (2, DIM, 3, 4) if "accept_image_fmap" in options else (2, DIM, 6) if first else (2, 6, DIM)
    for layer in (theirs, ours):
        layer(torch.randn(shape) * 2 + 1)
        layer.eval()
    x = torch.randn(shape)
    quantized, indices, _ = ours(x)
    torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)
    quantized, indices, _ = theirs(x)
    try:
        decoded = theirs.get_output_from_indices(indices)
    except RuntimeError:
        return
    assert decoded.shape != quantized.shape or not torch.allclose(decoded, quantized, atol=1e-3)


def test_minus_one_is_no_code():
    theirs, ours = pair()
    x, indices = torch.randn(1, 4, DIM), torch.tensor([[0, -1, 3, -1]])
    codes = ours.get_codes_from_indices(indices)
    assert torch.equal(codes[0, [0, 2]], ours.codebook[[0, 3]])
    assert (codes[0, [1, 3]] == 0).all()
    assert torch.equal(theirs.get_codes_from_indices(indices)[0, 1], theirs.codebook[-1])
    for layer in (theirs, ours):
        layer.update_indices(x, indices)
    counts = torch.full((SIZE,), 0.8)
    counts[[0, 3]] += 0.2
    torch.testing.assert_close(ours._codebook.cluster_size[0], counts)
    assert theirs._codebook.cluster_size[0, 0] > 1.2


def test_lengths_count_tokens_in_every_layout():
    theirs, ours = pair(channel_last=False)
    last = pair()[1]
    x, lens = torch.randn(2, 9, DIM), torch.tensor([4, 9])
    expected = last(x, lens=lens)
    for one, two in zip(ours(x.mT, lens=lens), expected, strict=True):
        torch.testing.assert_close(one.mT if one.ndim == 3 else one, two)
    with pytest.raises((RuntimeError, ValueError)):
        theirs(x.mT, lens=lens)


def test_a_vector_of_zeros_gets_a_finite_gradient():
    theirs, ours = pair(commitment_weight=0.0)
    gradients = []
    for layer in (ours, theirs):
        x = torch.zeros(1, 1, DIM, requires_grad=True)
        layer(x)[0].sum().backward()
        gradients.append(x.grad.norm())
    assert gradients[0] < 10 * ours.codebook.norm(dim=-1).max() * DIM
    assert gradients[1] > 1e4 * gradients[0]


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training):
    """Defect l."""
    theirs, ours = pair(threshold_ema_dead_code=1)
    x = torch.randn(1, 30, DIM)
    torch._dynamo.reset()
    torch.compile(ours.train(training), fullgraph=True, backend="eager")(x)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(theirs.train(training), fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()


def test_heads_and_every_option_together_still_agree_where_both_are_right():
    """The helpers compare: a changed value must not pass."""
    theirs, ours = clear_layers(heads=2, codebook_dim=6)
    x = batch_of(theirs)
    both = [run(layer, x, True) for layer in (ours, theirs)]
    assert_same(*both, "same")
    with pytest.raises(AssertionError):
        assert_same(run(ours, x + 0.5, True), both[1], "other")
