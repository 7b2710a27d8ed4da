"""`ResidualLFQ` and `GroupedResidualLFQ` against the recursion in float64, and as layers."""

from __future__ import annotations

import re

import pytest
import torch

from ferrovae.nn import LFQ, GroupedResidualLFQ, ResidualLFQ


def residuals(z, stages):
    """What each stage sees, and its signs scaled: z in float64."""
    seen, codes = [], []
    for stage in range(stages):
        seen.append(z)
        codes.append(((z > 0) * 2.0 - 1).double() * 0.5**stage)
        z = z - codes[-1]
    return seen, codes


def test_codes_are_signs_of_what_is_left():
    layer = ResidualLFQ(dim=6, num_quantizers=5, codebook_size=64)
    x = torch.randn(3, 10, 6)
    quantized, indices, losses, codes = layer(x, return_all_codes=True)
    seen, exact = residuals(x.double(), 5)
    torch.testing.assert_close(codes.double(), torch.stack(exact))
    torch.testing.assert_close(quantized.double(), sum(exact), rtol=1e-5, atol=1e-6)
    weights = 2 ** torch.arange(5, -1, -1)
    for stage in range(5):
        assert torch.equal(indices[..., stage], ((seen[stage] > 0) * weights).sum(-1))
        alone = LFQ(dim=6, codebook_scale=0.5**stage)(seen[stage].float())
        torch.testing.assert_close(losses[stage], alone.entropy_aux_loss, rtol=1e-4, atol=1e-5)
    # What no stage reaches is at most the last scale, for z in (-2, 2).
    inside = x.abs() < 2
    assert ((layer.eval()(x)[0] - x)[inside].abs() <= 0.5**4 + 1e-6).all()


def test_every_stage_passes_the_gradient_on():
    layer = ResidualLFQ(dim=6, num_quantizers=5, codebook_size=64)
    x = torch.randn(3, 10, 6, requires_grad=True)
    layer(x)[0].sum().backward()
    assert (x.grad == 5).all()


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"dim": 12, "spherical": True}, (2, 9, 12)),
        ({"dim": 12, "orthogonal_rotation": True}, (2, 9, 12)),
        ({"dim": 4, "spherical": True, "orthogonal_rotation": True}, (2, 3, 9, 4)),
    ],
)
def test_decoding_gives_what_evaluation_gives(options, shape):
    layer = ResidualLFQ(num_quantizers=3, codebook_size=16, channel_first=False, **options).eval()
    quantized, indices, _ = layer(torch.randn(shape))
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=1e-4, atol=1e-5)


def test_thirty_six_bits():
    layer = ResidualLFQ(dim=36, num_quantizers=3, codebook_size=2**36)
    x = torch.randn(2, 9, 36)
    quantized, indices, losses = layer(x)
    assert losses.isfinite().all()
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)


def test_dropout_by_sample():
    """Each sample keeps its own stages; the loss of a stage is about the samples that keep it."""
    layer = ResidualLFQ(
        dim=6, num_quantizers=4, codebook_size=64, quantize_dropout=True, quantize_dropout_per_sample=True
    )
    x = torch.randn(12, 10, 6)
    mask = torch.rand(12, 10) > 0.3
    quantized, indices, losses = layer(x, mask=mask, rand_quantize_dropout_fixed_seed=5)
    kept = (indices >= 0).all(1).sum(-1)
    assert len(kept.unique()) > 1
    seen, codes = residuals(x.double(), 4)
    for sample in range(12):
        total = sum(code[sample] for code in codes[: kept[sample]])
        torch.testing.assert_close(quantized[sample].double(), total, rtol=1e-5, atol=1e-6)
        assert (indices[sample, :, kept[sample] :] == -1).all()
    for stage in range(4):
        rows = seen[stage].float()[kept > stage][mask[kept > stage]]
        alone = LFQ(dim=6, codebook_scale=0.5**stage)(rows[None]).entropy_aux_loss
        torch.testing.assert_close(losses[stage], alone, rtol=1e-4, atol=1e-5)


def test_masks_and_layouts_of_groups():
    layer = GroupedResidualLFQ(dim=12, groups=2, accept_image_fmap=True, num_quantizers=3, codebook_size=8)
    x = torch.randn(2, 12, 3, 4)
    mask = torch.rand(2, 3, 4) > 0.4
    quantized, indices, losses = layer(x, mask=mask)
    tokens = GroupedResidualLFQ(dim=12, groups=2, num_quantizers=3, codebook_size=8)
    tokens.load_state_dict(layer.state_dict())
    flat = tokens(x.flatten(2).mT, mask=mask.flatten(1))
    torch.testing.assert_close(quantized.flatten(2).mT, flat[0])
    assert torch.equal(indices.flatten(2, 3), flat[1])
    torch.testing.assert_close(losses, flat[2])
    first = GroupedResidualLFQ(dim=12, groups=2, channel_first=True, num_quantizers=3, codebook_size=8)
    first.load_state_dict(layer.state_dict())
    torch.testing.assert_close(first(x.flatten(2))[0], quantized.flatten(2))
    assert layer.split_dim == first.split_dim == 1
    assert layer.codebooks.shape == (2, 3, 8, 3)
    assert layer.get_codes_from_indices(indices).shape == (2, 3, 2, 3, 4, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"orthogonal_rotation": True}, {"spherical": True}])
def test_precision(dtype, options):
    layer = ResidualLFQ(dim=12, num_quantizers=3, codebook_size=16, **options).to(dtype)
    x = torch.randn(2, 9, 12).to(dtype).requires_grad_()
    quantized, indices, losses = layer(x)
    (quantized.sum() + losses.sum()).backward()
    assert (quantized.dtype, x.grad.dtype, losses.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=5e-2, atol=5e-2)


def test_autocast():
    layer = ResidualLFQ(dim=12, num_quantizers=3, codebook_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, _, losses = layer(torch.randn(2, 9, 12))
    assert (quantized.dtype, losses.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("by_sample", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_whole(by_sample):
    torch.compiler.reset()
    layer = GroupedResidualLFQ(
        dim=12,
        groups=2,
        num_quantizers=3,
        codebook_size=16,
        quantize_dropout=True,
        quantize_dropout_per_sample=by_sample,
    )
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 9, 12)
    for train in (True, False):
        layer.train(train)
        results = []
        for run in (layer, whole):
            torch.manual_seed(0)
            inputs = x.clone().requires_grad_()
            quantized, indices, losses = run(inputs)
            (quantized.square().sum() + losses.sum()).backward()
            results.append((quantized, indices, losses, inputs.grad))
        torch.testing.assert_close(*results)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_complaints():
    with pytest.raises(ValueError, match="ResidualLFQ: has_projections is a stage's"):
        ResidualLFQ(dim=4, num_quantizers=2, codebook_size=16, has_projections=True)
    with pytest.raises(ValueError, match="ResidualLFQ: num_codebooks is a stage's: use GroupedResidualLFQ"):
        ResidualLFQ(dim=4, num_quantizers=2, codebook_size=16, num_codebooks=2)
    with pytest.raises(ValueError, match=re.escape("LFQ: soft_clamp_input_value is 0.25, expected at least")):
        ResidualLFQ(dim=4, num_quantizers=2, codebook_size=16, soft_clamp_input_value=0.25)
    layer = ResidualLFQ(dim=4, num_quantizers=2, codebook_size=16)
    with pytest.raises(ValueError, match=re.escape("ResidualLFQ: x is (2, 9, 3), expected (B, ..., 4)")):
        layer(torch.randn(2, 9, 3))
    with pytest.raises(ValueError, match="ResidualLFQ: indices run from -2 to 3, expected -1 to 15"):
        layer.get_codes_from_indices(torch.tensor([[[-2, 3]]]))
    with pytest.raises(ValueError, match="only quantize_dropout=True trains for fewer"):
        layer.get_codes_from_indices(torch.zeros(1, 3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=re.escape("ResidualLFQ: mask is (9,), expected (2, 9)")):
        layer(torch.randn(2, 9, 4), mask=torch.ones(9, dtype=torch.bool))
    with pytest.raises(ValueError, match="GroupedResidualLFQ: dim is 5 and groups 2"):
        GroupedResidualLFQ(dim=5, groups=2, num_quantizers=2, codebook_size=16)
