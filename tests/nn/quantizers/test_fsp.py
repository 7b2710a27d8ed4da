"""FSP: its distribution functions, bins and perturbations, and the moments it holds."""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import FSP
from ferrovae.nn.quantizers.cdf_activations import CDF_ACTIVATIONS
from ferrovae.nn.quantizers.vector_norm import VectorNorm

DENSITIES = {
    "tanh": lambda z: 1 / (2 * z.cosh() ** 2),
    "sigmoid": lambda z: 1 / (2 * (z / 2).cosh()) ** 2,
    "normal": lambda z: torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5,
    "laplace": lambda z: torch.exp(-z.abs()) / 2,
    "cauchy": lambda z: 1 / (torch.pi * (1 + z * z)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_distribution_functions(name):
    act = CDF_ACTIVATIONS[name]
    z = torch.linspace(-4, 4, 81, dtype=torch.float64).requires_grad_()
    values = act.forward(z)
    (slopes,) = torch.autograd.grad(values.sum(), z)
    away = z.detach().abs() > 1e-9  # the Laplace density has a kink there
    torch.testing.assert_close(slopes[away], DENSITIES[name](z.detach())[away])
    assert float(act.forward(torch.zeros(()))) == 0.5
    torch.testing.assert_close(act.inverse(values.detach()), z.detach(), rtol=1e-7, atol=1e-7)
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("inverse", [False, True])
def test_evaluation_gives_the_middle_of_the_bin(name, inverse):
    levels = [4, 7]
    layer = FSP(levels, act_name=name, need_inv_act=inverse).eval()
    x = torch.randn(3, 40, 2)
    quantized, indices, _, info = layer(x)
    u = CDF_ACTIVATIONS[name].forward(x.double())
    bins = (u * torch.tensor(levels)).floor()
    assert torch.equal(info["level_indices"].double(), bins)
    assert torch.equal(indices, (bins[..., 0] + 4 * bins[..., 1]).int())
    middle = (bins + 0.5) / torch.tensor(levels)
    expected = CDF_ACTIVATIONS[name].inverse(middle) if inverse else (middle - 0.5) * 12**0.5
    torch.testing.assert_close(quantized.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.indices_to_codes(indices), quantized, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inverse", [False, True])
def test_half_precision_input_reaches_every_bin_and_its_middle(inverse):
    layer = FSP([200], act_name="cauchy", need_inv_act=inverse).eval()
    x = torch.tensor([-200.0, -60.0, 0.0, 60.0, 200.0])[:, None].bfloat16()
    quantized, indices, _, _ = layer(x)
    assert indices.tolist() == [0, 1, 100, 198, 199]
    torch.testing.assert_close(quantized, layer.indices_to_codes(indices).bfloat16())


def test_perturbations_stay_within_half_a_bin_and_within_0_and_1():
    levels = torch.tensor([4, 7])
    layer = FSP(levels.tolist())
    x = 2 * torch.randn(20_000, 2)
    u = (x.tanh() + 1) / 2
    quantized, _, _, info = layer(x)
    moved = quantized / 12**0.5 + 0.5
    assert ((moved - u).abs() <= 1 / (2 * levels) + 1e-6).all()
    assert ((moved >= 0) & (moved <= 1)).all()
    # a move of scale h = 1 / (2 L) from u leaves (0, 1) with probability (h - min(u, 1 - u)) / 2h, if positive
    half = 1 / (2 * levels.double())
    edge = torch.minimum(u.double(), 1 - u.double())
    leaves = ((half - edge) / (2 * half)).clamp(min=0)
    error = (leaves * (1 - leaves)).sum().sqrt() / leaves.numel()
    assert abs(float(info["p_accept_prob"]) - float(1 - leaves.mean())) < 5 * float(error)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_share_that_is_quantized(rate):
    layer = FSP([4, 4], quantize_rate=rate)
    x = torch.randn(10_000, 2)
    quantized, _, _, info = layer(x)
    share = (quantized == layer.eval()(x)[0]).double().mean()
    assert abs(float(share) - rate) <= 5 * (rate * (1 - rate) / 20_000) ** 0.5
    assert ("p_accept_prob" in info) == (rate < 1)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_are_those_of_the_activation_or_the_identity(inverse):
    layer = FSP([4, 4], quantize_rate=1.0, need_inv_act=inverse)
    x = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    layer(x)[0].sum().backward()
    z = x.detach()
    expected = torch.ones_like(z) if inverse else DENSITIES["tanh"](z) * 12**0.5
    torch.testing.assert_close(x.grad, expected)


def test_the_penalty_is_0_at_the_moments_it_wants():
    z = torch.tensor([-1.0, 1.0]).repeat(500)[:, None].double()
    norm = VectorNorm(l2_target=1000 / 999, l4_target=-2 + (1 - (999 / 1000) ** 2), l4_weight=0.05)
    penalty, moments = norm(z)
    assert float(moments["mean"]) == pytest.approx(0, abs=1e-12)
    assert float(moments["variance"]) == pytest.approx(1000 / 999)
    assert float(moments["skewness"]) == pytest.approx(0, abs=1e-12)
    assert float(moments["kurtosis"]) == pytest.approx((999 / 1000) ** 2 - 3)
    assert float(penalty) == pytest.approx(0.05 * ((999 / 1000) ** 2 - 3 - norm.l4_target) ** 2)
    assert float(VectorNorm(l1_target=2.0, l2_weight=0, l3_weight=0, l4_weight=0)(z)[0]) == pytest.approx(0.4)


def test_a_nan_row_has_index_0():
    x = torch.randn(3, 2)
    x[1, 0] = torch.nan
    quantized, indices, _, _ = FSP([4, 4]).eval()(x)
    assert indices[1] == 0
    assert quantized[[0, 2]].isfinite().all()


def test_more_than_31_bits():
    indices = FSP([1000] * 5).eval()(torch.full((1, 5), 9.0))[1]
    assert indices.dtype == torch.int64
    assert int(indices) == 10**15 - 1


@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(training):
    layer = FSP([4, 5], dim=3, quantize_rate=0.5, channel_first=True).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    results = []
    for run in (compiled, layer):
        torch.manual_seed(2)
        x.grad = None
        quantized, indices, loss, _ = run(x)
        (quantized.square().sum() + loss).backward()
        results.append((quantized, indices, loss, x.grad))
    torch.testing.assert_close(results[0], results[1])


def test_exports():
    layer = FSP([4, 5], dim=3).eval()
    x = torch.randn(2, 9, 3)
    program = torch.export.export(layer, (x,)).module()
    for ours, exported in zip(layer(x)[:3], program(x)[:3], strict=True):
        torch.testing.assert_close(ours, exported)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"levels": []}, "levels is empty"),
        ({"quantize_rate": 1.5}, "quantize_rate is 1.5"),
        ({"act_name": "relu"}, "act_name is 'relu', expected one of"),
        ({"vector_norm": "l1"}, "vector_norm is 'l1'"),
        ({"dim": 0}, "dim is 0"),
    ],
)
def test_bad_options(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        FSP(**({"levels": [4, 4]} | options))


def test_bad_input():
    layer = FSP([4, 4])
    with pytest.raises(ValueError, match=r"z is \(2, 3\), expected \(\.\.\., 2\)"):
        layer(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"z is torch\.int64"):
        layer(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected 0 to 15"):
        layer.indices_to_codes(torch.tensor([16]))
