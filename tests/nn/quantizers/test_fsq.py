"""FSQ: its two formulas in float64, its indices as arithmetic, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ferrovae.nn import FSQ


def formula(levels, z, symmetric, clamp):
    """Codes and gradients in float64, element by element."""
    codes, slopes = torch.empty_like(z), torch.empty_like(z)
    for i, level in enumerate(levels):
        for row in range(z.shape[0]):
            value = float(z[row, i])
            if symmetric:
                inside = max(-1.0, min(1.0, value)) if clamp else math.tanh(value)
                slope = float(abs(value) <= 1) if clamp else 1 - inside**2
                codes[row, i] = 2 / (level - 1) * math.floor((level - 1) * (inside + 1) / 2 + 0.5) - 1
                slopes[row, i] = slope
            else:
                half, offset = (level - 1) * 1.001 / 2, 0.0 if level % 2 else 0.5
                shifted = value + (offset / half if clamp else math.atanh(offset / half))
                inside = max(-1.0, min(1.0, shifted)) if clamp else math.tanh(shifted)
                slope = float(abs(shifted) <= 1) if clamp else 1 - inside**2
                codes[row, i] = round(inside * half - offset) / (level // 2)
                slopes[row, i] = slope * half / (level // 2)
    return codes, slopes


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_and_gradients_follow_the_formula(symmetric, clamp):
    levels = [3, 4, 7, 8]
    layer = FSQ(levels, preserve_symmetry=symmetric, bound_hard_clamp=clamp)
    z = (1.3 * torch.randn(60, 4, dtype=torch.float64)).requires_grad_()
    codes, slopes = formula(levels, z.detach(), symmetric, clamp)
    quantized, indices = layer(z)
    torch.testing.assert_close(quantized, codes, rtol=1e-12, atol=1e-12)
    torch.autograd.backward(quantized, torch.ones_like(z))
    torch.testing.assert_close(z.grad, slopes, rtol=1e-6, atol=1e-6)
    digits = (codes + 1) / 2 * (torch.tensor(levels) - 1) if symmetric else (codes + 1) * (torch.tensor(levels) // 2)
    assert torch.equal(indices, (digits.round() * torch.tensor([1, 3, 12, 84])).sum(-1).int())


@pytest.mark.parametrize("symmetric", [False, True])
def test_indices_number_the_product_of_the_levels(symmetric):
    levels = [3, 4, 5]
    layer = FSQ(levels, preserve_symmetry=symmetric)
    digits = torch.tensor([word[::-1] for word in itertools.product(range(5), range(4), range(3))])
    indices = torch.arange(60)
    assert torch.equal(layer.indices_to_level_indices(indices), digits)
    codebook = layer.implicit_codebook
    assert codebook.unique(dim=0).shape == (60, 3)
    assert torch.equal(layer.codes_to_indices(codebook), indices.int())
    # a code is where rounding leaves it alone, and evaluation gives it exactly
    assert torch.equal(layer.indices_to_codes(indices[None]), codebook[None])


@pytest.mark.parametrize(
    ("options", "shape", "grid"),
    [
        ({}, (5, 4), (5,)),
        ({}, (2, 7, 4), (2, 7)),
        ({}, (2, 4, 3, 5), (2, 3, 5)),
        ({"dim": 6, "num_codebooks": 3}, (2, 6, 3, 5, 2), (2, 3, 5, 2, 3)),
        ({"dim": 6, "channel_first": True}, (2, 6, 7), (2, 7)),
        ({"dim": 6, "channel_first": True, "keep_num_codebooks_dim": True}, (2, 6), (2, 1)),
    ],
)
def test_evaluation_gives_exactly_what_the_indices_decode_to(options, shape, grid):
    layer = FSQ([8, 5, 5, 4], **options).eval()
    quantized, indices = layer(torch.randn(shape))
    assert quantized.shape == shape
    assert indices.shape == grid
    if len(shape) > 2 or "channel_first" in options:
        torch.testing.assert_close(layer.indices_to_codes(indices), quantized, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_half_precision_numbers_are_not_rounded_again_where_they_are_quantized(symmetric):
    z = torch.linspace(-2, 2, 300)[None, :, None].bfloat16()
    unforced, forced = (
        FSQ([250], preserve_symmetry=symmetric, force_quantization_f32=force)(z) for force in (False, True)
    )
    assert torch.equal(unforced[1], forced[1])
    assert torch.equal(unforced[0], forced[0])
    assert unforced[0].dtype == torch.bfloat16


def test_codebooks_beyond_32_bits_take_64_bit_indices_and_no_memory():
    levels = [1000] * 6
    layer = FSQ(levels)
    assert layer.codebook_size == 10**18
    codes, indices = layer(3 * torch.randn(4, 50, 6, dtype=torch.float64))
    assert indices.dtype == torch.int64
    assert (indices > 2**53).any()
    torch.testing.assert_close(layer.indices_to_codes(indices).double(), codes, rtol=1e-6, atol=1e-6)
    assert FSQ([2**15, 2**16])(torch.randn(1, 3, 2))[1].dtype == torch.int32
    assert FSQ([2**16, 2**16])(torch.randn(1, 3, 2))[1].dtype == torch.int64
    with pytest.raises(ValueError, match="do not fit 64-bit"):
        FSQ([1000] * 7)


def test_a_nan_is_seen_and_has_index_0():
    z = torch.randn(1, 3, 2)
    z[0, 1, 0] = torch.nan
    quantized, indices = FSQ([5, 5])(z)
    assert indices[0, 1] == 0
    assert quantized.isnan().any(-1).tolist() == [[False, True, False]]
    extremes, indices = FSQ([5, 5])(torch.tensor([[[torch.inf, -torch.inf]]]))
    assert extremes.tolist() == [[[1, -1]]]
    assert indices.tolist() == [[4]]


@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_noise_has_its_probability_and_range(probability):
    layer = FSQ([5, 5], preserve_symmetry=True, noise_dropout=probability)
    z = torch.zeros(1, 20_000, 2)
    quantized, indices = layer(z)
    noise = quantized[quantized != 0]
    expected = probability * z.numel()
    assert abs(noise.numel() - expected) <= 5 * (expected * (1 - probability)) ** 0.5
    assert noise.abs().max() <= 0.5
    # the variance of a uniform number on [-1/2, 1/2)
    assert abs(noise.square().mean() - 1 / 12) < 5 * (1 / 180 / noise.numel()) ** 0.5
    assert (indices == 12).all()
    assert (layer.eval()(z)[0] == 0).all()
    assert (layer.train()(z + 3)[0] <= 1).all()


def test_rotation_is_undone():
    layer = FSQ([63] * 4, orthogonal_rotation=True, preserve_symmetry=True, bound_hard_clamp=True).eval()
    z = 0.5 * torch.rand(3, 40, 4) - 0.25
    quantized, indices = layer(z)
    # within half a step in rotated channels
    assert ((quantized - z).norm(dim=-1) <= 2 * 1 / 62 + 1e-6).all()
    assert (quantized - z @ layer.orthogonal_rot).norm() > (quantized - z).norm()
    torch.testing.assert_close(layer.indices_to_codes(indices), quantized)
    with pytest.warns(UserWarning, match="different levels"):
        FSQ([5, 4], orthogonal_rotation=True)


@pytest.mark.parametrize("options", [{"dim": 6}, {"preserve_symmetry": True, "noise_dropout": 0.5}])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(options, training):
    layer = FSQ([4, 4, 4], **options).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, layer.dim, requires_grad=True)
    torch.manual_seed(1)
    quantized, indices = compiled(x)
    assert torch.equal(indices, layer(x)[1])
    quantized.sum().backward()
    gradient, x.grad = x.grad, None
    torch.manual_seed(1)
    again = layer(x)[0]
    again.sum().backward()
    torch.testing.assert_close(quantized, again)
    torch.testing.assert_close(gradient, x.grad)


def test_exports():
    layer = FSQ([8, 5, 5], dim=6).eval()
    x = torch.randn(3, 6, 4, 4)
    program = torch.export.export(layer, (x,)).module()
    for ours, exported in zip(layer(x), program(x), strict=True):
        torch.testing.assert_close(ours, exported)


@pytest.mark.parametrize(
    ("arguments", "options", "complaint"),
    [
        (([],), {}, "levels is empty"),
        (([5, 1],), {}, "at least 2"),
        (([5, 2],), {}, "2 needs preserve_symmetry"),
        (([5, 5],), {"noise_dropout": 0.5}, "noise_dropout needs preserve_symmetry"),
        (([5, 5],), {"noise_dropout": 1.5, "preserve_symmetry": True}, "expected a probability"),
        (([5, 5],), {"num_codebooks": 2, "keep_num_codebooks_dim": False}, "needs num_codebooks=1"),
        (([5, 5],), {"num_codebooks": 0}, "num_codebooks is 0"),
        (([5, 5], 0), {}, "dim is 0"),
    ],
)
def test_bad_options(arguments, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        FSQ(*arguments, **options)


def test_bad_input():
    layer = FSQ([5, 5])
    with pytest.raises(TypeError, match="expected integers"):
        FSQ([5.0, 5])
    with pytest.raises(ValueError, match=r"z is \(2, 7, 3\), expected \(B, N, 2\)"):
        layer(torch.zeros(2, 7, 3))
    with pytest.raises(ValueError, match=r"expected \(B, 2, \.\.\.\)"):
        layer(torch.zeros(2, 7, 3, 2))
    with pytest.raises(TypeError, match=r"z is torch\.int64"):
        layer(torch.zeros(2, 7, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes are \(4, 3\)"):
        layer.codes_to_indices(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="run from -1 to 25, expected 0 to 24"):
        layer.indices_to_codes(torch.tensor([[-1, 25]]))
    with pytest.raises(TypeError, match="expected an integer dtype"):
        layer.indices_to_codes(torch.zeros(1, 2))
