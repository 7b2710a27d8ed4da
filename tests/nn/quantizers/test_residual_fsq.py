"""Residual FSQ: what the stages leave over, what dropped stages give, and every layout."""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import GroupedResidualFSQ, ResidualFSQ

LEVELS = [5, 4, 3]


def stack(**options):
    return ResidualFSQ(**({"levels": LEVELS, "num_quantizers": 3} | options))


def step(levels, stage):
    """How far apart the codes of a stage lie."""
    return 2 / (torch.tensor(levels) - 1) * torch.tensor(levels, dtype=torch.float32) ** -stage


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_what_is_left_over_is_at_most_half_a_step_of_the_last_stage(stages):
    layer = stack(num_quantizers=stages).eval()
    x = 3 * torch.randn(4, 200, 3)
    clamp = layer.soft_clamp_input_value
    target = (x / clamp).tanh() * clamp
    assert ((layer(x)[0] - target).abs() <= step(LEVELS, stages - 1) / 2 * 1.001 + 1e-6).all()


@pytest.mark.parametrize(
    ("options", "shape", "indices_shape"),
    [
        ({}, (5, 3), (5, 3)),
        ({"dim": 7}, (2, 6, 7), (2, 6, 3)),
        ({"dim": 7}, (2, 4, 6, 7), (2, 4, 6, 3)),
        ({"dim": 7, "is_channel_first": True}, (2, 7, 6), (2, 3, 6)),
        # three columns, as many as there are stages
        ({"dim": 7, "is_channel_first": True}, (2, 7, 3), (2, 3, 3)),
        ({"dim": 7, "is_channel_first": True}, (2, 7, 4, 6), (2, 3, 4, 6)),
        ({"orthogonal_rotation": True, "levels": [4, 4, 4], "dim": 7}, (2, 6, 7), (2, 6, 3)),
    ],
)
def test_indices_decode_to_the_output_in_every_layout(options, shape, indices_shape):
    layer = stack(**options).eval()
    quantized, indices, codes = layer(torch.randn(shape), return_all_codes=True)
    assert quantized.shape == shape
    assert indices.shape == indices_shape
    assert indices.dtype == torch.int32
    torch.testing.assert_close(layer.get_codes_from_indices(indices), codes)
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=1e-5, atol=1e-6)
    if layer.is_channel_first:
        last = indices.movedim(1, -1)
        if last.shape[1] != 3:
            torch.testing.assert_close(layer.get_output_from_indices(last), quantized.movedim(1, -1))
        quantized = quantized.movedim(1, -1)
    torch.testing.assert_close(layer.project_out(codes.sum(0)), quantized, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"dim": 5}, {"bound_hard_clamp": False}])
def test_codes_of_a_float64_layer_are_float64(options):
    layer = stack(**options).double().eval()
    quantized, indices, codes = layer(torch.randn(2, 6, layer.dim).double(), return_all_codes=True)
    assert codes.dtype == torch.float64
    torch.testing.assert_close(layer.project_out(codes.sum(0)), quantized, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.get_codes_from_indices(indices), codes)


def test_codebooks_hold_the_codes_before_their_scales():
    layer = stack(levels=[4, 4], orthogonal_rotation=True).eval()
    _, indices, codes = layer(torch.randn(2, 5, 2), return_all_codes=True)
    for stage in range(3):
        found = layer.codebooks[stage][indices[..., stage]] * layer.scales[stage]
        torch.testing.assert_close(found, codes[stage])


def test_each_stage_adds_its_straight_through_gradient():
    layer = stack(bound_hard_clamp=False, soft_clamp_input_value=None, num_quantizers=2)
    x = torch.randn(1, 20, 3, dtype=torch.float64, requires_grad=True)
    quantized, _, codes = layer(x, return_all_codes=True)
    quantized.sum().backward()
    residuals = [x.detach(), x.detach() - codes[0].double()]
    scales = layer.scales.double()
    expected = sum(1 - (residual / scale).tanh() ** 2 for residual, scale in zip(residuals, scales, strict=True))
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_sample", [True, False])
def test_dropped_stages_are_those_of_a_shorter_stack(per_sample):
    layer = stack(num_quantizers=5, quantize_dropout=True, quantize_dropout_per_sample=per_sample, dim=4)
    x = torch.randn(32, 7, 4)
    full = layer.eval()(x, return_all_codes=True)
    layer.train()
    quantized, indices, codes = layer(x, return_all_codes=True, rand_quantize_dropout_fixed_seed=8)
    kept = layer.kept_stages(32, None, 8).expand(32)
    assert kept.unique().numel() == (5 if per_sample else 1)
    dropped = torch.arange(5) >= kept[:, None, None]
    assert torch.equal(indices, full[1].long().masked_fill(dropped, -1))
    torch.testing.assert_close(codes, full[2].masked_fill(dropped.movedim(-1, 0)[..., None], 0.0))
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=1e-5, atol=1e-6)
    # the same stages without the -1
    if not per_sample:
        coarse = indices[..., : int(kept[0])]
        torch.testing.assert_close(layer.get_output_from_indices(coarse), quantized, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert (layer(x)[1] >= 0).all()


def test_a_seed_of_torch_fixes_the_draw():
    layer = stack(num_quantizers=8, quantize_dropout=True)
    x = torch.randn(2, 3, 3, requires_grad=True)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append([int((layer(x)[1] >= 0).sum()) for _ in range(10)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1


@pytest.mark.parametrize("channel_first", [True, False])
@pytest.mark.parametrize("image", [True, False])
def test_groups_are_stacks_of_their_channels(image, channel_first):
    options = {"levels": LEVELS, "num_quantizers": 3, "is_channel_first": channel_first}
    layer = GroupedResidualFSQ(dim=8, groups=2, accept_image_fmap=image, **options).eval()
    x = torch.randn((2, 8, 4, 5) if image else (2, 8, 6) if channel_first else (2, 6, 8))
    quantized, indices, codes = layer(x, return_all_codes=True)
    assert quantized.shape == x.shape
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=1e-5, atol=1e-6)
    for ours, one in zip(layer.get_codes_from_indices(indices), codes, strict=True):
        torch.testing.assert_close(ours, one)
    axis = layer.split_dim
    for number, part in enumerate(x.chunk(2, axis)):
        rows = part if channel_first else part.movedim(axis, -1)
        wanted, wanted_indices = layer.rvqs[number](rows)
        wanted = wanted if channel_first else wanted.movedim(-1, axis)
        torch.testing.assert_close(quantized.chunk(2, axis)[number], wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(indices[number], wanted_indices)


def test_groups_keep_equally_many_stages():
    layer = GroupedResidualFSQ(dim=6, groups=2, levels=LEVELS, num_quantizers=6, quantize_dropout=True)
    x = torch.randn(2, 5, 6)
    for _ in range(10):
        _, indices = layer(x)
        kept = (indices >= 0).sum(-1)
        assert kept.unique().numel() == 1


def test_a_nan_row_has_index_0_and_leaves_the_others_alone():
    layer = stack().eval()
    x = torch.randn(1, 4, 3)
    clean = layer(x)
    x[0, 2, 1] = torch.nan
    quantized, indices = layer(x)
    assert indices[0, 2].tolist() == [0, 0, 0]
    others = [0, 1, 3]
    assert torch.equal(indices[0, others], clean[1][0, others])
    assert torch.equal(quantized[0, others], clean[0][0, others])


def test_training_compiles_into_one_graph():
    options = {"quantize_dropout": True, "quantize_dropout_per_sample": True, "num_quantizers": 3}
    layer = GroupedResidualFSQ(dim=10, groups=2, levels=LEVELS, accept_image_fmap=True, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 10, 2, 4, requires_grad=True)
    results, kept = [], []
    for run in (compiled, layer) * 2:
        torch.manual_seed(len(results) // 2)
        x.grad = None
        quantized, indices = run(x)
        quantized.square().sum().backward()
        results.append((quantized, indices, x.grad))
        kept.append((indices >= 0).sum(-1)[0, :, 0, 0].tolist())
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[3])
    assert kept[0] != kept[2]


def test_evaluation_compiles_into_one_graph():
    layer = stack(dim=5, is_channel_first=True).eval()
    x = torch.randn(5, 5, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_exports():
    layer = stack(dim=6, is_channel_first=True).eval()
    x = torch.randn(2, 6, 9)
    program = torch.export.export(layer, (x,)).module()
    for ours, exported in zip(layer(x), program(x), strict=True):
        torch.testing.assert_close(ours, exported)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"levels": [5, 1]}, "at least 2"),
        ({"soft_clamp_input_value": 2.0}, "needs bound_hard_clamp=False"),
        ({"soft_clamp_input_value": [2.0, 3.0], "bound_hard_clamp": False}, "soft_clamp_input_value is"),
        ({"return_indices": False}, "returns its indices"),
        ({"channel_first": True}, "pass is_channel_first"),
        ({"num_codebooks": 2}, "use GroupedResidualFSQ"),
        ({"num_quantizers": 0}, "ResidualFSQ: num_quantizers is 0"),
        ({"quantize_dropout": True, "quantize_dropout_cutoff_index": 3}, "less than the 3 stages"),
    ],
)
def test_bad_options(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        stack(**options)


def test_bad_input():
    with pytest.raises(TypeError, match="preserve_symmetry is always on"):
        stack(preserve_symmetry=True)
    with pytest.raises(TypeError, match="unknown"):
        stack(unknown=1)
    with pytest.raises(ValueError, match=r"x is \(2, 5, 4\), expected \(B, ..., 3\)"):
        stack()(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"x is \(2, 5, 3\), expected \(B, 3, ...\)"):
        stack(is_channel_first=True)(torch.zeros(2, 5, 3))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        stack()(torch.zeros(2, 5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="only quantize_dropout=True"):
        stack().get_codes_from_indices(torch.zeros(2, 5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="run from 0 to 60, expected -1 to 59"):
        stack().get_codes_from_indices(torch.tensor([[[0, 60, 3]]]))
    with pytest.raises(ValueError, match="groups to divide dim"):
        GroupedResidualFSQ(dim=7, groups=2, levels=LEVELS, num_quantizers=2)
    layer = GroupedResidualFSQ(dim=6, groups=2, levels=LEVELS, num_quantizers=2, accept_image_fmap=True)
    with pytest.raises(ValueError, match=r"expected \(B, 6, H, W\)"):
        layer(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"expected \(B, 6, H, W\)"):
        layer(torch.zeros(2, 4, 6, 6))
    with pytest.raises(ValueError, match="indices has 3 groups"):
        layer.get_codes_from_indices(torch.zeros(3, 2, 4, 4, 2, dtype=torch.int64))
