"""VectorQuantize's usage report, wide topk, drawn sets, codebooks by token in parts, export, memory."""

from __future__ import annotations

import math

import pytest
import torch

from evidence.profiling import peak_bytes
from ferrovae.nn import VectorQuantize
from ferrovae.nn.quantizers.lookup import look_up
from ferrovae.nn.quantizers.losses import chosen_codes, orthogonality
from ferrovae.nn.quantizers.straight_through import rotate_to
from ferrovae.nn.quantizers.token_codebooks import ConditionedTransform, TokenCodebooks

DIM, SIZE = 6, 11


def test_usage_of_the_moving_counts():
    layer = VectorQuantize(DIM, SIZE, decay=0.0)
    codes = torch.eye(SIZE)[:, :DIM] * 10
    codes[DIM:] = torch.arange(SIZE - DIM)[:, None] + 100.0
    for used in ([0, 0, 1, 2], [0, 0, 1, 1]):
        layer.codebook = codes
        layer(codes[used])
    report = layer.usage()
    assert report.active == 2
    assert (~report.dead).nonzero().flatten().tolist() == [0, 1]
    torch.testing.assert_close(report.entropy, torch.tensor(math.log(2)))
    torch.testing.assert_close(report.perplexity, torch.tensor(2.0))
    assert report.age.tolist() == [0, 0, 1] + [2] * (SIZE - 3)
    assert layer.usage(threshold=3).active == 0
    assert "age" not in " ".join(layer.state_dict())


def test_usage_of_given_indices():
    layer = VectorQuantize(DIM, SIZE, 3, heads=2, separate_codebook_per_head=True, ema_update=False)
    indices = torch.tensor([[[0, 1], [0, 2], [-1, 3], [5, 4]]])
    report = layer.usage(indices)
    assert report.active.tolist() == [2, 4]
    torch.testing.assert_close(report.perplexity[1], torch.tensor(4.0))
    frequencies = torch.tensor([2 / 3, 1 / 3])
    torch.testing.assert_close(report.entropy[0], torch.special.entr(frequencies).sum())
    with pytest.raises(ValueError, match=r"VectorQuantize: usage\(\) of a codebook that keeps no counts: pass indices"):
        layer.usage()


def test_usage_of_a_codebook_that_nothing_went_to():
    report = VectorQuantize(DIM, SIZE).usage(torch.tensor([-1, -1]))
    assert report.entropy == 0
    assert report.perplexity == 1


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("topk", [1, 5, 40])
def test_topk_is_a_sort_of_the_distances(cosine, topk):
    x, codes = torch.randn(2, 50, DIM), torch.randn(2, 60, DIM)
    scores = x.double() @ codes.double().mT if cosine else -torch.cdist(x.double(), codes.double())
    expected = scores.sort(dim=-1, descending=True).indices[..., :topk]
    assert torch.equal(look_up(x, codes, cosine=cosine, topk=topk), expected)
    assert look_up(x[:, :0], codes, cosine=cosine, topk=topk).shape == (2, 0, topk)


def test_drawn_sets_are_draws_without_replacement():
    x, codes = torch.zeros(1, 40_000, 1), torch.tensor([[[0.0], [1.0], [2.0]]])
    torch.manual_seed(0)
    drawn = look_up(x, codes, cosine=False, topk=2, temperature=1.0)[0]
    assert (drawn[:, 0] != drawn[:, 1]).all()
    p = (-codes[0, :, 0]).softmax(0)
    for first in range(3):
        for second in range(3):
            expected = float(p[first] * p[second] / (1 - p[first])) if first != second else 0.0
            share = ((drawn[:, 0] == first) & (drawn[:, 1] == second)).double().mean()
            assert abs(share - expected) < 5 * math.sqrt(0.25 / 40_000)


def test_a_layer_draws_from_the_softmax_of_its_distances():
    layer = VectorQuantize(1, 3, stochastic_sample_codes=True, sample_codebook_temp=0.5, freeze_codebook=True)
    layer.codebook = torch.tensor([[0.0], [1.0], [2.0]])
    torch.manual_seed(0)
    indices = layer(torch.zeros(1, 40_000, 1))[1]
    expected = (-torch.arange(3.0) / 0.5).softmax(0)
    shares = torch.bincount(indices.flatten(), minlength=3) / 40_000
    assert (shares - expected).abs().max() < 5 * math.sqrt(0.25 / 40_000)
    assert (layer.eval()(torch.zeros(1, 100, 1))[1] == 0).all()


def test_a_random_choice_of_active_codes():
    active = torch.arange(10).expand(2, 10) < torch.tensor([[7], [2]])
    hits = torch.zeros(2, 10)
    for _ in range(600):
        chosen = chosen_codes(active, 3)
        assert chosen.sum(-1).tolist() == [3, 2]
        hits += chosen
    assert (hits[~active] == 0).all()
    assert (hits[0, :7] / 600 - 3 / 7).abs().max() < 5 * math.sqrt(0.25 / 600)
    assert torch.equal(chosen_codes(active, 10), active)


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 9, 4)])
def test_orthogonality_by_definition(shape):
    codes = torch.randn(shape, dtype=torch.float64)
    cosine = torch.cosine_similarity(codes[:, :, None], codes[:, None], dim=-1)
    torch.testing.assert_close(orthogonality(codes), cosine.square().mean() - 1 / shape[1])
    active = torch.arange(shape[1]).expand(shape[:2]) < 3
    torch.testing.assert_close(orthogonality(codes, active), cosine[:, :3, :3].square().mean() - 1 / 3)


def whole(function, condition):
    """The same transform, without a way to ask for a part."""
    return lambda codes: function(codes, condition=condition)


def moved(codes, *, condition):
    return codes[:, None, None] + torch.tanh(condition)[None, :, :, None] * codes.sin()[:, None, None]


@pytest.mark.parametrize(
    "options", [{}, {"commitment_use_cross_entropy_loss": True}, {"codebook_diversity_loss_weight": 1.0}]
)
def test_codebooks_of_rows_in_parts_are_those_made_at_once(monkeypatch, options):
    monkeypatch.setattr("ferrovae.nn.quantizers.token_codebooks._NUMBERS", 7 * SIZE * DIM)
    layer = VectorQuantize(DIM, SIZE, learnable_codebook=True, ema_update=False, **options)
    x, condition = torch.randn(3, 9, DIM), torch.randn(3, 9, DIM)
    results = []
    for transform in (ConditionedTransform, whole):
        given, inputs = condition.clone().requires_grad_(), x.clone().requires_grad_()
        layer.zero_grad()
        quantized, indices, loss = layer(inputs, codebook_transform_fn=transform(moved, given))
        (quantized.square().sum() + loss).backward()
        results.append([quantized, indices, loss, inputs.grad, given.grad, layer._codebook.embed.grad.clone()])
    torch.testing.assert_close(*results)
    codes = moved(layer._codebook.embed, condition=condition)[0]
    expected = torch.linalg.vector_norm(x[:, :, None] - codes, dim=-1).argmin(-1)
    assert torch.equal(results[0][1], expected)


def test_parts_hold_no_more_than_their_share():
    sizes = []

    def spy(codes, *, condition):
        sizes.append(condition.shape[1] * codes.shape[1] * codes.shape[2])
        return moved(codes, condition=condition)

    codes, x = torch.randn(1, 4096, 16), torch.randn(1, 300, 16)
    TokenCodebooks(ConditionedTransform(spy, x), codes, cosine=False).look_up(x)
    assert max(sizes) * 4 <= 64 << 20
    assert len(sizes) > 1


@pytest.mark.parametrize(
    "options",
    [{"codebook_dim": 3, "heads": 2}, {"affine_param": True}, {"use_cosine_sim": True, "accept_image_fmap": True}],
)
def test_the_eval_path_exports(options):
    layer = VectorQuantize(DIM, SIZE, **options)
    x = torch.randn(2, DIM, 3, 4) if "accept_image_fmap" in options else torch.randn(2, 5, DIM)
    layer(x)
    layer.eval()
    exported = torch.export.export(layer, (x,)).module()
    for one, two in zip(exported(x), layer(x), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"topk": 0}, {}, "topk is 0"),
        ({"topk": 2}, {"heads": 2, "codebook_dim": 3}, "topk needs heads=1"),
        ({"topk": 2}, {"commitment_use_cross_entropy_loss": True}, "topk excludes commitment_use"),
        ({"lens": torch.tensor([1, 2, 3])}, {}, "lens is"),
        ({"lens": torch.tensor([1, 2]), "mask": torch.ones(2, 5, dtype=torch.bool)}, {}, "both given"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int64)}, {}, "indices are"),
        ({"ema_update_weight": torch.ones(3)}, {}, "ema_update_weight is"),
        ({"codebook_transform_fn": lambda codes: codes}, {"heads": 2, "codebook_dim": 3}, "heads that share"),
    ],
)
def test_arguments_of_a_call_that_cannot_be(arguments, options, message):
    with pytest.raises(ValueError, match=f"VectorQuantize: .*{message}"):
        VectorQuantize(DIM, SIZE, **options)(torch.randn(2, 5, DIM), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads is 0"),
        ({"directional_reparam": True}, "threshold_ema_dead_code > 0"),
        ({"directional_reparam": True, "rotation_trick": True, "threshold_ema_dead_code": 1}, "exclude each other"),
        ({"vq_bridge": torch.nn.Identity(), "learnable_codebook": False}, "vq_bridge needs"),
        ({"sync_update_v": 0.5}, "sync_update_v > 0 needs"),
        ({"sync_update_v": 1.5}, "sync_update_v is 1.5"),
        ({"affine_param": True, "use_cosine_sim": True}, "affine_param=True excludes"),
        ({"in_place_codebook_optimizer": torch.optim.SGD}, "in_place_codebook_optimizer needs"),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "accept_image_fmap=True excludes"),
        ({"orthogonal_reg_max_codes": 0}, "orthogonal_reg_max_codes is 0"),
        ({"sync_timeout": 0}, "sync_timeout is 0"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"VectorQuantize: .*{message}"):
        VectorQuantize(DIM, SIZE, **options)


def test_decoding_an_index_that_no_code_has():
    layer = VectorQuantize(DIM, SIZE)
    for wrong in (-2, SIZE):
        with pytest.raises(ValueError, match=f"VectorQuantize: indices hold {wrong}, expected -1 to 10"):
            layer.get_codes_from_indices(torch.tensor([[0, wrong]]))


def test_rotation_gradients_block_by_block_are_those_at_once(monkeypatch):
    x, codes, cotangent = torch.randn(3, 2, 50, DIM)
    gradients = []
    for block in (1 << 20, 7 * DIM):
        monkeypatch.setattr("ferrovae.nn.quantizers.straight_through._BLOCK", block)
        inputs = x.clone().requires_grad_()
        rotate_to(inputs, codes).backward(cotangent)
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "options", [{}, {"threshold_ema_dead_code": 2}, {"use_cosine_sim": True}, {"affine_param": True}]
)
def test_a_step_holds_no_matrix_of_rows_and_codes(options):
    rows, codes, dim = 8192, 8192, 4
    layer, x = VectorQuantize(dim, codes, **options), torch.randn(1, rows, dim, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        quantized, _, loss = layer(x)
        (quantized.sum() + loss).backward()
    assert peak_bytes(profile) <= 4 * (3 * rows * dim + 3 * codes * dim) + (64 << 20) < 4 * rows * codes
