"""VectorQuantize: what it returns, and the laws of its codebook."""

from __future__ import annotations

import math

import pytest
import torch

from ferrovae.nn import VectorQuantize

DIM, SIZE = 6, 11


def nearest_by_brute_force(x, codebook):
    return (x.double()[..., None, :] - codebook.double()).square().sum(-1).argmin(-1)


def codes_and_statistics(layer):
    book = layer._codebook
    return {name: getattr(book, name).clone() for name in ("embed", "embed_avg", "cluster_size")}


def assert_unchanged(layer, before):
    for name, tensor in before.items():
        assert torch.equal(getattr(layer._codebook, name), tensor), name


@pytest.mark.parametrize(
    ("options", "shape", "grid"),
    [
        ({}, (4, DIM), (4,)),
        ({}, (4, 5, DIM), (4, 5)),
        ({"channel_last": False}, (4, DIM, 5), (4, 5)),
        ({"channel_last": False}, (4, DIM), (4,)),
        ({"accept_image_fmap": True}, (2, DIM, 3, 5), (2, 3, 5)),
        ({"accept_image_fmap": True, "channel_last": False, "codebook_dim": 2}, (2, DIM, 3, 5), (2, 3, 5)),
    ],
)
def test_eval_gives_exactly_the_nearest_code_in_every_layout(options, shape, grid):
    layer = VectorQuantize(DIM, SIZE, **options).eval()
    x = torch.randn(shape, requires_grad=True)
    quantized, indices, loss = layer(x)
    assert quantized.shape == shape
    assert indices.shape == grid
    assert indices.dtype == torch.int64
    last = x if len(shape) == 2 or options == {} else x.movedim(1, -1)
    assert torch.equal(indices, nearest_by_brute_force(layer.project_in(last), layer.codebook))
    assert torch.equal(quantized, layer.get_output_from_indices(indices))
    if "codebook_dim" not in options:
        assert torch.equal(quantized, layer.get_codes_from_indices(indices))
        assert not quantized.requires_grad
    assert loss == 0
    assert not loss.requires_grad


def test_one_step_is_the_moving_average_of_counts_and_sums():
    layer = VectorQuantize(DIM, SIZE, decay=0.9, eps=1e-5)
    x = torch.randn(3, 40, DIM)
    before = {name: tensor.double()[0] for name, tensor in codes_and_statistics(layer).items()}
    assert torch.equal(before["cluster_size"], torch.ones(SIZE).double())
    assert torch.equal(before["embed_avg"], before["embed"])
    _, indices, loss = layer(x)
    one_hot = torch.nn.functional.one_hot(indices.flatten(), SIZE).double()
    counts = 0.9 * before["cluster_size"] + 0.1 * one_hot.sum(0)
    sums = 0.9 * before["embed_avg"] + 0.1 * one_hot.T @ x.double().flatten(0, 1)
    smoothed = (counts + 1e-5) / (counts.sum() + SIZE * 1e-5) * counts.sum()
    torch.testing.assert_close(layer._codebook.cluster_size[0].double(), counts, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer._codebook.embed_avg[0].double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.codebook.double(), sums / smoothed[:, None], rtol=1e-5, atol=1e-5)
    # vectors and loss are those of the codebook before the step
    expected = (x.double() - before["embed"][indices]).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_straight_through_gradient_is_the_identity():
    layer = VectorQuantize(DIM, SIZE, rotation_trick=False, commitment_weight=0.0)
    x = torch.randn(7, DIM, requires_grad=True)
    cotangent = torch.randn(7, DIM)
    quantized, _, loss = layer(x)
    quantized.backward(cotangent)
    assert torch.equal(x.grad, cotangent)
    assert loss == 0


def test_rotation_gradient_is_the_scaled_rotation_onto_the_code():
    layer = VectorQuantize(DIM, SIZE, commitment_weight=0.0)
    codebook = layer.codebook.double().clone()
    x = torch.randn(1, DIM, requires_grad=True)
    quantized, indices, _ = layer(x)
    rows = [torch.autograd.grad(quantized[0, d], x, retain_graph=True)[0][0] for d in range(DIM)]
    jacobian = torch.stack(rows).double()
    code = codebook[indices[0]]
    scale = code.norm() / x.detach().double().norm()
    torch.testing.assert_close(jacobian @ jacobian.T, scale**2 * torch.eye(DIM).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(jacobian @ x.detach().double()[0], code, rtol=1e-5, atol=1e-6)
    assert torch.linalg.det(jacobian) > 0
    # it turns within the plane of the two and leaves what is orthogonal to both where it is
    basis = torch.linalg.svd(torch.stack([x.detach().double()[0], code])).Vh[2:]
    torch.testing.assert_close(basis @ jacobian.T, scale * basis, rtol=1e-4, atol=1e-5)


def test_commitment_pulls_the_input_only():
    layer = VectorQuantize(DIM, SIZE, rotation_trick=False, commitment_weight=0.25)
    codebook = layer.codebook.clone()
    x = torch.randn(7, DIM, requires_grad=True)
    _, indices, loss, breakdown = layer(x, return_loss_breakdown=True)
    loss.backward()
    torch.testing.assert_close(loss, 0.25 * breakdown.commitment)
    torch.testing.assert_close(x.grad, 0.25 * 2 * (x.detach() - codebook[indices]) / x.numel())
    assert [float(term) for term in breakdown[1:]] == [0, 0, 0]


def test_learnable_codebook_gets_the_gradient_of_the_commitment():
    layer = VectorQuantize(DIM, SIZE, learnable_codebook=True, ema_update=False)
    x = torch.randn(50, DIM)
    before = codes_and_statistics(layer)
    _, indices, loss = layer(x)
    loss.backward()
    difference = (layer.codebook.detach()[indices] - x) * 2 / x.numel()
    expected = torch.zeros(SIZE, DIM).index_add_(0, indices, difference)
    torch.testing.assert_close(layer._codebook.embed.grad[0], expected)
    assert_unchanged(layer, before)
    layer.zero_grad()
    assert not layer(x, freeze_codebook=True)[2].requires_grad


def test_straight_through_gives_project_in_the_gradient_of_the_expected_code():
    layer = VectorQuantize(DIM, SIZE, 3, straight_through=True, rotation_trick=False, commitment_weight=0.0)
    weight, bias = layer.project_in.weight, layer.project_in.bias
    x, cotangent = torch.randn(9, DIM), torch.randn(9, DIM)
    codebook = layer.codebook.clone()
    layer(x)[0].backward(cotangent)
    projected = x @ weight.T + bias
    expected_code = (-torch.cdist(projected, codebook)).softmax(-1) @ codebook
    gradient = torch.autograd.grad(layer.project_out(expected_code), weight, cotangent)[0]
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-5)


def test_cosine_codes_have_length_one_and_angle_decides():
    layer = VectorQuantize(DIM, SIZE, use_cosine_sim=True)
    x = torch.randn(60, DIM)
    codebook = layer.codebook.clone()
    quantized, indices, _ = layer(x)
    angles = torch.nn.functional.cosine_similarity(x[:, None].double(), codebook.double(), dim=-1)
    assert torch.equal(indices, angles.argmax(-1))
    torch.testing.assert_close(quantized, codebook[indices])
    torch.testing.assert_close(layer.codebook.norm(dim=-1), torch.ones(SIZE))
    assert not torch.equal(layer.codebook, codebook)
    shrunk = VectorQuantize(DIM, SIZE, use_cosine_sim=True).eval()
    assert torch.equal(shrunk(x)[1], shrunk(x * 1e-3)[1])


def test_freezing_holds_the_codebook_and_a_call_overrides_it():
    x = torch.randn(30, DIM)
    layer = VectorQuantize(DIM, SIZE, freeze_codebook=True, threshold_ema_dead_code=2)
    before = codes_and_statistics(layer)
    layer(x)
    assert_unchanged(layer, before)
    layer(x, freeze_codebook=False)
    assert not torch.equal(layer._codebook.embed, before["embed"])
    thawed = VectorQuantize(DIM, SIZE)
    before = codes_and_statistics(thawed)
    thawed(x, freeze_codebook=True)
    thawed.eval()(x)
    assert_unchanged(thawed, before)


def test_masked_vectors_take_no_part():
    torch.manual_seed(1)
    layers = [VectorQuantize(DIM, SIZE, 4, threshold_ema_dead_code=0.9, decay=0.5) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    visible = torch.randn(5, 8, DIM)
    padded = torch.cat([visible, torch.full((5, 4, DIM), math.nan)], 1).requires_grad_()
    mask = torch.arange(12).expand(5, 12) < 8
    quantized, indices, loss = layers[0](padded, mask=mask)
    reference, reference_indices, reference_loss = layers[1](visible.requires_grad_())
    assert torch.equal(indices[:, :8], reference_indices)
    assert (indices[:, 8:] == -1).all()
    torch.testing.assert_close(quantized[:, :8], reference)
    assert (quantized[:, 8:] == 0).all()
    torch.testing.assert_close(loss, reference_loss)
    for first, second in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        torch.testing.assert_close(first, second)
    (loss + quantized.sum()).backward()
    (reference_loss + reference.sum()).backward()
    torch.testing.assert_close(padded.grad[:, :8], visible.grad)
    assert (padded.grad[:, 8:] == 0).all()
    torch.testing.assert_close(layers[0].project_in.weight.grad, layers[1].project_in.weight.grad)


def test_masked_vectors_can_come_out_as_they_went_in():
    layer = VectorQuantize(DIM, SIZE, channel_last=False, return_zeros_for_masked_padding=False)
    x = torch.randn(2, DIM, 9)
    mask = torch.arange(9).expand(2, 9) < 4
    quantized, indices, _ = layer(x, mask=mask)
    assert torch.equal(quantized[..., 4:], x[..., 4:])
    assert torch.equal(layer.get_codes_from_indices(indices)[..., 4:], torch.zeros(2, DIM, 5))


@pytest.mark.parametrize("options", [{}, {"threshold_ema_dead_code": 2}, {"use_cosine_sim": True}, {"decay": 0.0}])
@pytest.mark.parametrize("empty", ["masked", "no rows", "not finite"])
def test_a_batch_with_nothing_in_it_only_decays_the_counts(options, empty):
    layer = VectorQuantize(DIM, SIZE, **options)
    layer(torch.randn(30, DIM))
    before = codes_and_statistics(layer)
    x = torch.randn(0 if empty == "no rows" else 3, 4, DIM)
    if empty == "not finite":
        x[..., 0] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    mask = torch.zeros(3, 4, dtype=torch.bool) if empty == "masked" else None
    _, indices, loss = layer(x, mask=mask)
    if empty == "not finite":
        assert (indices == 0).all()
        assert not loss.isfinite()
    else:
        assert loss == 0
    decay = options.get("decay", 0.8)
    torch.testing.assert_close(layer._codebook.cluster_size, before["cluster_size"] * decay)
    for buffer in layer.buffers():
        assert buffer.isfinite().all()
    if decay > 0:
        torch.testing.assert_close(layer._codebook.embed_avg, before["embed_avg"] * decay)


def test_rows_that_are_not_finite_never_enter_the_codebook():
    layers = [VectorQuantize(DIM, SIZE, threshold_ema_dead_code=0.5) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    good = torch.randn(20, DIM)
    bad = torch.randn(5, DIM)
    bad[:, 2] = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf])
    _, indices, _ = layers[0](torch.cat([good, bad]))
    assert (indices[20:] == 0).all()
    layers[1](good)
    for first, second in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        assert torch.equal(first, second)


def test_a_sum_that_overflows_leaves_its_code_alone():
    layer = VectorQuantize(2, 3)
    layer.codebook = torch.tensor([[0.0, 0.0], [3e38, 0.0], [-9.0, 0.0]])
    layer(torch.tensor([[3e38, 0.0], [3e38, 0.0], [-9.0, 0.0]]))
    for buffer in layer.buffers():
        assert buffer.isfinite().all()


@pytest.mark.parametrize(("scale", "offset"), [(1e-5, 0.0), (1.0, 1000.0), (1e-3, 10.0), (1e5, 0.0)])
def test_scale_and_offset_change_no_index(scale, offset):
    layer = VectorQuantize(16, 64).eval()
    codes = (torch.randn(64, 16) * scale + offset).float()
    x = (torch.randn(500, 16) * scale + offset).float()
    layer.codebook = codes
    assert torch.equal(layer(x)[1], nearest_by_brute_force(x, codes))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_statistics_stay_float32_and_the_output_follows_the_input(cast):
    layer = getattr(VectorQuantize(DIM, SIZE, 4, decay=0.999), cast)()
    dtype = layer.project_in.weight.dtype
    assert dtype == getattr(torch, cast)
    x = torch.randn(40, DIM, dtype=dtype, requires_grad=True)
    quantized, _, loss = layer(x)
    assert quantized.dtype == dtype
    assert loss.dtype == (torch.float64 if cast == "double" else torch.float32)
    assert {buffer.dtype for buffer in layer.state_dict().values()} == {dtype, torch.float32, torch.bool}
    before = layer._codebook.cluster_size.clone()
    layer(x)
    assert not torch.equal(layer._codebook.cluster_size, before)
    layer.load_state_dict({key: value.to(torch.bfloat16) for key, value in layer.state_dict().items()}, assign=True)
    assert layer._codebook.embed.dtype == torch.float32


def test_autocast_changes_no_index():
    layer = VectorQuantize(64, 256).eval()
    x, codes = torch.randn(1000, 64), torch.randn(256, 64)
    layer.codebook = codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, indices, _ = layer(x)
        layer.train()(x)
    assert torch.equal(indices, nearest_by_brute_force(x, codes))
    assert torch.equal(quantized, codes[indices])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"codebook_dim": 0}, "codebook_dim is 0"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"kmeans_iters": 0}, "kmeans_iters is 0"),
        ({"commitment_weight": -1.0}, "commitment_weight is -1.0"),
        ({"threshold_ema_dead_code": -1}, "threshold_ema_dead_code is -1"),
        ({"straight_through": True}, "pass rotation_trick=False"),
        ({"learnable_codebook": True}, "pass ema_update=False"),
        ({"learnable_codebook": True, "ema_update": False, "use_cosine_sim": True}, "use_cosine_sim"),
        (
            {"learnable_codebook": True, "ema_update": False, "straight_through": True, "rotation_trick": False},
            "straight_through",
        ),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"VectorQuantize: .*{message}"):
        VectorQuantize(**{"dim": DIM, "codebook_size": SIZE} | options)


def test_inputs_that_do_not_fit():
    layer = VectorQuantize(DIM, SIZE)
    with pytest.raises(ValueError, match=r"x is \(2, 5\), expected \(B, 6\) or \(B, N, 6\)"):
        layer(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"x is \(2, 6, 3, 4\), expected \(B, 6\) or \(B, 6, N\)"):
        VectorQuantize(DIM, SIZE, channel_last=False)(torch.randn(2, DIM, 3, 4))
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        layer(torch.zeros(2, DIM, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask is \(2, 3\), expected \(2, 4\)"):
        layer(torch.randn(2, 4, DIM), mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask is torch.float32"):
        layer(torch.randn(2, 4, DIM), mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"expected \(B, 6, H, W\)"):
        VectorQuantize(DIM, SIZE, accept_image_fmap=True)(torch.randn(2, DIM))


@pytest.mark.parametrize(
    ("options", "input_grad"),
    [
        ({"threshold_ema_dead_code": 1}, True),
        ({"codebook_dim": 3, "rotation_trick": False, "straight_through": True}, False),
        pytest.param({"use_cosine_sim": True, "kmeans_init": True}, True, marks=pytest.mark.slow),
    ],
)
def test_compiles_whole(options, input_grad):
    torch._dynamo.reset()
    eager, layer = (VectorQuantize(DIM, SIZE, **options) for _ in range(2))
    eager(torch.randn(40, DIM))
    layer(torch.randn(40, DIM))
    layer.load_state_dict(eager.state_dict())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 20, DIM)
        first, second = x.clone().requires_grad_(input_grad), x.clone().requires_grad_(input_grad)
        weights = torch.randn(2, 20, DIM)
        eager.zero_grad()
        layer.zero_grad()
        for module, inputs in ((eager, first), (compiled, second)):
            quantized, _, loss = module(inputs)
            total = (quantized * weights).sum() + loss
            if total.requires_grad:
                total.backward()
        if input_grad:
            torch.testing.assert_close(first.grad, second.grad)
        for one, two in zip(eager.parameters(), layer.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
        for one, two in zip(eager.buffers(), layer.buffers(), strict=True):
            torch.testing.assert_close(one, two)
    eager.eval()
    layer.eval()
    assert torch.equal(eager(x)[0], compiled(x)[0])
