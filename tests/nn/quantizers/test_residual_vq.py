"""The residual stacks against brute force, closed forms and their own laws."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from ferrovae.nn import GroupedResidualVQ, HierarchicalVQ, ResidualVQ
from ferrovae.nn.quantizers.straight_through import rotate_to

DIM, SIZE, STAGES = 8, 16, 3


def stack(**options):
    torch.manual_seed(1)
    return ResidualVQ(**{"dim": DIM, "num_quantizers": STAGES, "codebook_size": SIZE, **options})


def brute_force(layer, x):
    """Stage by stage in float64: indices, and the residual before each stage."""
    residual, indices, residuals = x.double(), [], []
    for codes in layer.codebooks:
        residuals.append(residual)
        indices.append(torch.cdist(residual, codes.double().expand(len(x), -1, -1)).argmin(-1))
        residual = residual - codes.double()[indices[-1]]
    return torch.stack(indices, -1), residuals


@pytest.mark.parametrize("training", [True, False])
def test_each_stage_takes_the_code_nearest_to_what_is_left(training):
    layer = stack().train(training)
    x = torch.randn(3, 20, DIM)
    indices, _ = brute_force(layer, x)
    codes = layer.get_codes_from_indices(indices)
    quantized, found, losses = layer(x)
    assert torch.equal(found, indices)
    torch.testing.assert_close(quantized, codes.sum(0), rtol=0, atol=1e-6)
    assert losses.shape == (STAGES,)
    assert (losses > 0).all() == training


@pytest.mark.parametrize("rotate", [True, False])
def test_losses_and_gradients_are_those_of_the_definition(rotate):
    layer = stack(rotation_trick=rotate, commitment_weight=0.3)
    x = torch.randn(3, 20, DIM, requires_grad=True)
    weight = torch.randn(3, 20, DIM)
    codes = [codes.clone() for codes in layer.codebooks]
    indices, _ = brute_force(layer, x.detach())
    quantized, _, losses = layer(x)
    (grad,) = torch.autograd.grad((quantized * weight).sum() + (losses * torch.arange(1, 4)).sum(), x)
    exact = x.detach().double().requires_grad_()
    residual, total, due = exact, 0, []
    for stage, book in enumerate(codes):
        code = book.double()[indices[..., stage]]
        total = total + (rotate_to(residual, code) if rotate else residual + (code - residual).detach())
        due.append(0.3 * (residual - code).square().mean())
        residual = residual - code
    due = torch.stack(due)
    (expected,) = torch.autograd.grad((total * weight).sum() + (due * torch.arange(1, 4)).sum(), exact)
    torch.testing.assert_close(losses.double(), due, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"threshold_ema_dead_code": 2}, {"shared_codebook": True}, {"decay": 0.99}])
def test_one_lookup_does_what_stages_one_by_one_do(options):
    together, apart = stack(**options), stack(**options)
    apart._chained = lambda: True
    for number in range(4):
        x, mask = torch.randn(3, 20, DIM), torch.rand(3, 20) > 0.2
        x[0, 0] = 0.0  # no direction to rotate
        x[1, 1] = together.codebooks[0, 3]
        results = []
        for layer in (together, apart):
            inputs = x.clone().requires_grad_()
            out = layer(inputs, mask=mask if number % 2 else None)
            ((out[0] * torch.linspace(-1, 1, DIM)).sum() + out[2].sum()).backward()
            results.append((*out, inputs.grad, dict(layer.state_dict())))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        apart.load_state_dict(together.state_dict())


def test_masked_tokens_take_no_part():
    mask = torch.rand(3, 20) > 0.4
    x = torch.randn(3, 20, DIM)
    layer, other = stack(), stack()
    quantized, indices, losses = layer(x, mask=mask)
    alone = other(x[mask][None])
    assert (quantized[~mask] == 0).all()
    assert (indices[~mask] == -1).all()
    assert torch.equal(indices[mask], alone[1][0])
    torch.testing.assert_close(losses, alone[2])
    torch.testing.assert_close(dict(layer.state_dict()), dict(other.state_dict()))
    nothing = layer(x, mask=torch.zeros(3, 20, dtype=torch.bool))
    assert (nothing[2] == 0).all()
    before = layer.codebooks
    layer(torch.full((1, 4, DIM), torch.nan))
    assert layer.codebooks.isfinite().all()
    torch.testing.assert_close(layer.codebooks, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 5}, {"use_cosine_sim": True}, {"beam_size": 2}])
def test_image_maps_are_tokens(options):
    images, tokens = stack(accept_image_fmap=True, **options), stack(**options)
    x = torch.randn(2, DIM, 3, 5)
    for layer in (images, tokens):
        layer.eval()
    quantized, indices, losses = images(x)
    flat = tokens(x.flatten(2).mT)
    torch.testing.assert_close(quantized, flat[0].mT.unflatten(2, (3, 5)))
    assert torch.equal(indices, flat[1].unflatten(1, (3, 5)))
    assert torch.equal(losses, flat[2])
    torch.testing.assert_close(images.get_output_from_indices(indices), quantized, rtol=1e-5, atol=1e-6)
    assert images(x, return_all_codes=True)[3].shape[:4] == (STAGES, 2, 3, 5)


def test_cross_entropy_at_indices():
    layer = stack().eval()
    x = torch.randn(2, 7, DIM, requires_grad=True)
    targets = torch.randint(SIZE, (2, 7, STAGES))
    _, residuals = brute_force(layer, x.detach())
    due = sum(
        torch.nn.functional.cross_entropy(-torch.cdist(rows, codes.double()).flatten(0, 1), targets[..., q].flatten())
        for q, (rows, codes) in enumerate(zip(residuals, layer.codebooks, strict=True))
    )
    quantized, loss = layer(x, indices=targets)
    torch.testing.assert_close(loss.double(), due, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantized, layer(x)[0], rtol=0, atol=1e-6)
    assert torch.equal(layer(x, indices=list(targets))[1], loss)
    loss.backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="indices hold -1"):
        layer(x, indices=targets - targets - 1)
    groups = GroupedResidualVQ(dim=2 * DIM, groups=2, num_quantizers=2, codebook_size=SIZE).eval()
    wide = torch.randn(2, 7, 2 * DIM)
    _, total = groups(wide, indices=targets[None, ..., :2].expand(2, -1, -1, -1))
    halves = zip(groups.rvqs, wide.chunk(2, dim=-1), strict=True)
    torch.testing.assert_close(total, sum(rvq(half, indices=targets[..., :2])[1] for rvq, half in halves))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"beam_size": 2}, {"shared_codebook": True}])
def test_dropout_for_each_sample(options, monkeypatch):
    layer = stack(quantize_dropout=True, quantize_dropout_per_sample=True, **options)
    kept = torch.tensor([1, 3, 2, 1])
    monkeypatch.setattr(layer, "kept_stages", lambda *args: kept)
    full = stack(**options).eval()
    x = torch.randn(4, 6, DIM)
    mask = torch.arange(STAGES) < kept[:, None, None]
    quantized, indices, losses = layer(x)
    assert torch.equal(indices == -1, (~mask).expand(4, 6, STAGES))
    if "beam_size" not in options:
        assert torch.equal(indices, torch.where(mask, full(x)[1], -1))
        torch.testing.assert_close(
            quantized, full.get_codes_from_indices(full(x)[1]).mul(mask.movedim(-1, 0)[..., None]).sum(0)
        )
    assert (losses > 0).all()
    counts = layer.layers[2]._codebook.cluster_size
    if "shared_codebook" not in options:
        # The third stage saw the 6 tokens of one sample: 0.8 * 16 + 0.2 * 6.
        torch.testing.assert_close(counts.sum(), torch.tensor(0.8 * SIZE + 0.2 * 6))


def test_a_dropped_stage_stays_as_it_is():
    layer = stack(quantize_dropout=True, threshold_ema_dead_code=1)
    layer.kept_stages = lambda *args: torch.tensor(2)
    before = {name: tensor.clone() for name, tensor in layer.layers[2].state_dict().items()}
    indices, losses = layer(torch.randn(2, 20, DIM))[1:]
    assert (indices[..., 2] == -1).all()
    assert losses[2] == 0
    for name, tensor in layer.layers[2].state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.slow
def test_a_dropped_stage_stays_as_it_is_in_a_graph():
    layer = stack(quantize_dropout=True, threshold_ema_dead_code=1)
    layer.kept_stages = lambda *args: torch.tensor(2)
    before = {name: tensor.clone() for name, tensor in layer.layers[2].state_dict().items()}
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, 20, DIM))
    assert not torch.equal(layer.layers[1]._codebook.cluster_size, torch.ones(1, SIZE))
    for name, tensor in layer.layers[2].state_dict().items():
        assert torch.equal(tensor, before[name])


def test_usage_ratio_replaces_codes_used_too_little():
    torch.manual_seed(0)
    plain, revived = stack(), stack(threshold_usage_ratio=0.1)
    for _ in range(60):
        x = torch.randn(4, 64, DIM) + 30
        for layer in (plain, revived):
            layer(x)
    assert int(plain.usage()[0].active) < SIZE // 2
    for stage in revived.usage():
        assert stage.active > 0.7 * SIZE
    counts = revived.layers[0]._codebook.cluster_size
    assert (counts >= 0.1 * counts.mean() * 0.99).all()


def test_a_wider_beam_is_never_worse_than_the_nearest_codes_alone():
    options = {"num_quantizers": 2, "beam_score_quantizer_weights": [0.0, 1.0]}
    x = torch.randn(4, 32, DIM)
    greedy = (stack(**options).eval()(x)[0] - x).square().sum(-1)
    beam = (stack(beam_size=4, **options).eval()(x)[0] - x).square().sum(-1)
    assert (beam <= greedy + 1e-5).all()
    assert beam.sum() < greedy.sum()
    exhaustive = stack(beam_size=6, codebook_size=6, num_quantizers=2, beam_score_quantizer_weights=[0, 1]).eval()
    sums = (exhaustive.codebooks[0][:, None] + exhaustive.codebooks[1][None]).flatten(0, 1)
    best = torch.cdist(x, sums.expand(4, -1, -1)).min(-1).values
    torch.testing.assert_close((exhaustive(x)[0] - x).norm(dim=-1), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_quantizers": 2},
        pytest.param({"quantize_dropout": True}, marks=pytest.mark.slow),
        pytest.param({"shared_codebook": True, "threshold_ema_dead_code": 2}, marks=pytest.mark.slow),
        pytest.param({"use_cosine_sim": True, "codebook_dim": 5}, marks=pytest.mark.slow),
        pytest.param({"beam_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_training_and_evaluation(options):
    layer = stack(**options)
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    torch._dynamo.reset()  # every layer is a graph of its own
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, DIM)
    for mode in (True, False):
        layer.train(mode)
        results = []
        for call in (layer, compiled):
            layer.load_state_dict(start)
            torch.manual_seed(0)
            inputs = x.clone().requires_grad_()
            out = call(inputs)
            if mode:
                (out[0].sum() + out[2].sum()).backward()
            results.append((*out, inputs.grad, {name: t.clone() for name, t in layer.state_dict().items()}))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


def test_half_precision_keeps_statistics_in_float32():
    layer = stack(codebook_dim=5).bfloat16()
    quantized, _, losses = layer(torch.randn(2, 9, DIM, dtype=torch.bfloat16))
    assert (quantized.dtype, losses.dtype) == (torch.bfloat16, torch.float32)
    assert layer.codebooks.dtype == torch.float32
    plain, x = stack().eval(), torch.randn(2, 9, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = plain(x)[1]
    assert torch.equal(cast, plain(x)[1])


def test_a_shared_codebook_is_saved_once_and_loads():
    layer, other = stack(shared_codebook=True), stack(shared_codebook=True)
    layer(torch.randn(2, 9, DIM))
    once = {name: tensor for name, tensor in layer.state_dict().items() if name.startswith("layers.0.")}
    other.load_state_dict(once, strict=True)
    assert torch.equal(other.codebooks, layer.codebooks)
    assert len({codes.data_ptr() for codes in (stage.codebook for stage in other.layers)}) == 1


@pytest.mark.parametrize(
    "options", [{}, {"codebook_dim": 5}, {"learnable_codebook": True, "ema_update": False}, {"groups": 2}]
)
@pytest.mark.parametrize("nested", [False, True])
def test_safetensors_saves_and_loads_a_shared_codebook(options, nested, tmp_path):
    def fresh():
        kind = GroupedResidualVQ if "groups" in options else ResidualVQ
        layer = kind(dim=DIM, num_quantizers=12, codebook_size=SIZE, shared_codebook=True, **options)
        return torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, DIM), "vq": layer}) if nested else layer

    one, two = fresh(), fresh()
    (one["vq"] if nested else one)(torch.randn(2, 9, DIM))
    path = tmp_path / "layer.safetensors"
    save_model(one, path)
    assert len([name for name in load_file(path) if name.endswith("embed")]) == options.get("groups", 1)
    assert load_model(two, path) == (set(), [])
    for name, tensor in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], tensor), name
    three = fresh()
    three.load_state_dict(load_file(path), strict=True)
    for name, tensor in one.state_dict().items():
        assert torch.equal(three.state_dict()[name], tensor), name
    rest = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("embed")}
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh().load_state_dict(rest, strict=True)
    save_file(rest, path)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(fresh(), path)


def test_k_means_of_each_stage_starts_from_what_is_left():
    torch.manual_seed(0)
    layer = stack(kmeans_init=True)
    x = torch.randn(8, 64, DIM)
    errors = (layer(x)[0] - x).square().mean(), (stack()(x)[0] - x).square().mean()
    assert errors[0] < 0.5 * errors[1]
    assert all(stage._codebook.initted for stage in layer.layers)


def test_bad_input_is_named():
    for options, complaint in [
        ({"heads": 2}, "ResidualVQ: heads is 2"),
        ({"codebook_size": (8, 8)}, "codebook_size has 2 sizes for 3 stages"),
        ({"codebook_size": (8, 8, 9), "shared_codebook": True}, "shared_codebook=True needs one size"),
        ({"eval_beam_size": 2}, "eval_beam_size needs beam_size"),
        ({"beam_score_quantizer_weights": [1.0]}, "beam_score_quantizer_weights has 1"),
    ]:
        with pytest.raises(ValueError, match=re.escape(complaint)):
            stack(**options)
    layer = stack()
    with pytest.raises(ValueError, match=re.escape("ResidualVQ: x is (2, 9, 7), expected")):
        layer(torch.randn(2, 9, 7))
    with pytest.raises(ValueError, match="indices hold 16 at stage 0"):
        layer.get_codes_from_indices(torch.full((1, 1, STAGES), SIZE))
    with pytest.raises(ValueError, match="only quantize_dropout=True"):
        layer.get_codes_from_indices(torch.zeros(1, 1, 1, dtype=torch.int64))


def test_hierarchy_drops_its_last_levels_and_pools_visible_positions():
    torch.manual_seed(0)
    layer = HierarchicalVQ(dim=4, codebook_size=3, scales=(1, 2, 4), nested_dropout=1.0, nested_dropout_min_levels=2)
    x = torch.randn(3, 4, 8)
    layer(x)  # k-means
    reconstruction, indices, _, cutoff = layer(x, return_cutoff=True)
    assert cutoff == 1
    assert [tuple(index.shape) for index in indices] == [(3, 1), (3, 2), (3, 4)]
    layer.eval()
    lens = torch.tensor([8, 5, 2])
    reconstruction, indices, loss = layer(x, lens=lens)
    assert loss == 0
    assert (reconstruction[2, :, 2:] == 0).all()
    assert torch.equal(indices[2][2], torch.where(torch.arange(4) < 1, indices[2][2], -1))
    pooled, held = layer.pool_residual(x, (1,), torch.arange(8) < lens[:, None])
    torch.testing.assert_close(pooled[1, :, 0], x[1, :, :5].mean(-1))
    assert held.all()
    with pytest.raises(ValueError, match="HierarchicalVQ: scales"):
        HierarchicalVQ(dim=4, codebook_size=8, scales=(4, 2))


def test_a_level_sees_the_shared_codebook_after_the_level_before():
    torch.manual_seed(0)
    options = {"kmeans_init": False, "threshold_ema_dead_code": 0, "decay": 0.5, "quant_resi": 0.0}
    layer = HierarchicalVQ(dim=4, codebook_size=5, scales=(2, 8), **options)
    x = torch.randn(3, 4, 8)
    book = layer.vq.codebook.double().clone()
    pooled = x.double().unflatten(2, (2, 4)).mean(-1).mT
    first = torch.cdist(pooled, book.expand(3, -1, -1)).argmin(-1)
    upsampled = torch.nn.functional.interpolate(book[first].mT, size=8, mode="linear", align_corners=False)
    counts = 0.5 + 0.5 * torch.bincount(first.flatten(), minlength=5)
    sums = 0.5 * book + 0.5 * torch.zeros(5, 4).double().index_add(0, first.flatten(), pooled.flatten(0, 1))
    moved = sums / counts[:, None]
    rows = (x.double() - upsampled).mT
    second = torch.cdist(rows, moved.expand(3, -1, -1)).argmin(-1)
    assert not torch.equal(second, torch.cdist(rows, book.expand(3, -1, -1)).argmin(-1))
    indices = layer(x)[1]
    assert torch.equal(indices[0], first)
    assert torch.equal(indices[1], second)


@pytest.mark.slow
def test_a_hierarchy_is_one_graph():
    options = {"dim": 4, "codebook_size": 3, "scales": (1, 2, 4), "nested_dropout": 0.5}
    layer = HierarchicalVQ(**options, kmeans_init=False)
    x = torch.randn(3, 4, 8)
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.load_state_dict(start)
        torch.manual_seed(0)
        results.append((*call(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}))
    torch.testing.assert_close(*results)
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])
