"""The laws every likelihood obeys: normalisation, moments, shapes, and what it says to bad data."""

from __future__ import annotations

import pytest
import torch

from ferrovae import likelihoods

FAMILIES = {
    "bernoulli": ("bernoulli", {}),
    "fixed": ("gaussian", {"sigma": 0.7}),
    "learned": ("gaussian", {"sigma": "learned"}),
    "per_dimension": ("gaussian", {"sigma": "per_dimension"}),
    "optimal": ("gaussian", {"sigma": "optimal"}),
    "categorical": ("categorical", {"classes": 5}),
    "logistic": ("discretized_logistic", {"levels": 6}),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    name, options = FAMILIES[request.param]
    return likelihoods.build(name, **options).eval()


def support(family):
    return {
        "bernoulli": torch.tensor([0.0, 1.0]),
        "categorical": torch.arange(5),
        "discretized_logistic": torch.arange(6) * (2 / 5) - 1,
    }[family.name]


def data(family, *shape):
    if family.name == "gaussian":
        return torch.rand(shape)
    return support(family)[torch.randint(len(support(family)), shape)]


def parameters(family, *shape, channels=1):
    """For data (channels, *rest), rest = shape behind the batch."""
    batch, rest = shape[:-2], shape[-2:]
    return torch.randn(*batch, family.channels * channels, *rest)


@pytest.mark.parametrize("name", ["bernoulli", "categorical", "logistic"])
def test_probabilities_sum_to_one_over_the_support(name):
    family = likelihoods.build(FAMILIES[name][0], **FAMILIES[name][1])
    distribution = family(3 * torch.randn(50, family.channels, dtype=torch.float64), 1)
    total = sum(distribution.log_prob(value.expand(50, 1)).exp() for value in support(family))
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [2, 3, 256])
@pytest.mark.parametrize("mean", [0.0, 0.95, -1.2])
@pytest.mark.parametrize("scale", [0.0005, 0.05, 2.0])
def test_discretized_logistic_sums_to_one_and_has_its_mean(levels, mean, scale):
    raw = torch.tensor([[mean, scale]], dtype=torch.float64)
    distribution = likelihoods.DiscretizedLogistic(levels)(torch.stack((raw[:, 0], raw[:, 1].log()), 1), 1)
    x = torch.arange(levels, dtype=torch.float64) * (2 / (levels - 1)) - 1
    mass = distribution.log_prob(x[:, None]).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-12)
    assert distribution.mean.item() == pytest.approx((mass * x).sum().item(), abs=1e-10)


@pytest.mark.parametrize("name", ["fixed", "per_dimension", "optimal"])
def test_gaussian_density_integrates_to_one(name):
    family = likelihoods.build("gaussian", **FAMILIES[name][1]).eval()
    x = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    distribution = family(torch.tensor([[0.3, 0.2][: family.channels]], dtype=torch.float64), 1)
    assert torch.trapezoid(distribution.log_prob(x[:, None]).exp(), x).item() == pytest.approx(1, abs=1e-9)


def test_samples_have_the_mean_and_the_log_prob(family):
    """Mean of x and entropy, each within 5 standard errors of 4000 samples."""
    distribution = family(parameters(family, 3, 2, 2), 3)
    x = distribution.sample((4000,))
    assert x.shape == (4000, 3, 1, 2, 2)
    values = x.to(torch.float64)
    error = 5 * values.std(0) / 4000**0.5 + 1e-3
    assert ((values.mean(0) - distribution.mean).abs() <= error).all()
    if family.name != "gaussian":  # enumerate the entropy of one dimension
        one = family(parameters(family, 1, 1, 1), 3)
        logs = torch.stack([one.log_prob(value.expand(1, 1, 1, 1)) for value in support(family)]).double()
        drawn = one.log_prob(one.sample((4000,))).double()
        assert abs(drawn.mean() - (logs.exp() * logs).sum()) <= 5 * drawn.std() / 4000**0.5 + 1e-6


def test_variance_is_that_of_the_samples():
    for name in ("bernoulli", "fixed", "per_dimension"):
        family = likelihoods.build(FAMILIES[name][0], **FAMILIES[name][1])
        distribution = family(parameters(family, 2, 2, 2), 3)
        drawn = distribution.sample((20_000,)).var(0)
        torch.testing.assert_close(drawn, distribution.variance, rtol=0.08, atol=0.01)


def test_shapes_and_leading_sample_dimensions(family):
    plain = parameters(family, 7, 3, 4, 5, channels=2)
    distribution = family(plain, 3)
    assert distribution.batch_shape == (7, 3)
    assert distribution.event_shape == (2, 4, 5) == distribution.mean.shape[2:]
    x = data(family, 3, 2, 4, 5)
    log_prob = distribution.log_prob(x)
    assert log_prob.shape == (7, 3)
    assert log_prob.dtype == torch.float32
    singly = torch.stack([family(plain[s], 3).log_prob(x) for s in range(7)])
    torch.testing.assert_close(log_prob, singly, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(log_prob, distribution.log_prob(x.expand(7, 3, 2, 4, 5)), rtol=1e-6, atol=1e-5)
    # x with more draws than z has, and x alone
    repeated = family(plain[0, 0], 3).log_prob(x)
    torch.testing.assert_close(repeated, family(plain[0, :1], 3).log_prob(x), rtol=1e-6, atol=1e-5)
    assert repeated.shape == (3,)
    assert distribution.log_prob(x[0]).shape == (7, 3)
    assert family(plain[0, 0], 3).log_prob(x[0]).shape == ()


def test_expand_is_the_same_distribution_repeated(family):
    distribution = family(parameters(family, 3, 2, 2), 3)
    larger = distribution.expand((4, 3))
    x = data(family, 4, 3, 1, 2, 2)
    assert larger.batch_shape == (4, 3)
    assert larger.sample((2,)).shape == (2, 4, 3, 1, 2, 2)
    torch.testing.assert_close(larger.log_prob(x), distribution.log_prob(x), rtol=1e-6, atol=1e-6)


def test_flat_data_and_empty_batches(family):
    flat = family(torch.randn(4, family.channels * 6), 1)
    assert flat.log_prob(data(family, 4, 6)).shape == (4,)
    empty = family(parameters(family, 0, 2, 2), 3)
    assert empty.log_prob(data(family, 0, 1, 2, 2)).shape == (0,)
    assert empty.sample((3,)).shape == (3, 0, 1, 2, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_evaluated_in_float32(family, dtype):
    half = parameters(family, 3, 2, 2).to(dtype)
    x = data(family, 3, 1, 2, 2)
    log_prob = family(half, 3).log_prob(x)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, family(half.float(), 3).log_prob(x), rtol=0, atol=0)


def test_gradients_against_finite_differences(family):
    family = family.double()
    x = data(family, 2, 1, 2, 1).double()
    raw = torch.randn(2, family.channels, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: family(p, 3).log_prob(x), (raw,))


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("bernoulli", [[0.0], [1.5]], r"bernoulli: example 1 of x holds 1\.5, which is outside \[0, 1\]"),
        ("bernoulli", [[float("nan")], [0.0]], "bernoulli: example 0 of x holds NaN"),
        ("fixed", [[0.0], [float("nan")]], "gaussian: example 1 of x holds NaN"),
        ("categorical", [[0.0], [2.5]], r"categorical: example 1 of x holds 2\.5, which is not a whole number"),
        ("categorical", [[5], [2]], r"categorical: example 0 of x holds 5, which is outside 0\.\.4"),
        ("logistic", [[0.0], [1.0]], "discretized_logistic: example 0 of x holds 0, which is none of the 6 levels"),
        ("logistic", [[-1.0], [1.2]], r"discretized_logistic: example 1 of x holds 1\.2, which is outside \[-1, 1\]"),
        ("logistic", [[-1.0], [float("nan")]], "discretized_logistic: example 1 of x holds NaN"),
    ],
)
def test_bad_data_is_named_with_its_example(name, x, message):
    family = likelihoods.build(FAMILIES[name][0], **FAMILIES[name][1])
    distribution = family(torch.zeros(2, family.channels), 1)
    with pytest.raises(ValueError, match=message):
        distribution.log_prob(torch.tensor(x))
    family.validate_args = False
    family(torch.zeros(2, family.channels), 1)  # the check is a choice; the distribution is not


def test_data_are_checked_also_when_torch_has_switched_its_own_checks_off(monkeypatch):
    """`torch.compile` does so for the whole process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    with pytest.raises(ValueError, match="is outside"):
        likelihoods.Bernoulli()(torch.zeros(1, 1), 1).log_prob(torch.full((1, 1), 2.0))


def test_wrong_shapes_are_named(family):
    with pytest.raises(ValueError, match=r"x is \(3, 1, 2, 3\), expected \(\.\.\., 1, 2, 2\)"):
        family(parameters(family, 3, 2, 2), 3).log_prob(data(family, 3, 1, 2, 3))
    if family.channels > 1:
        with pytest.raises(ValueError, match=f"expected a multiple of {family.channels}"):
            family(torch.zeros(3, family.channels + 1, 2, 2), 3)
    with pytest.raises(ValueError, match="event_dims is 0"):
        family(torch.zeros(3, family.channels), 0)


def test_build_names_what_it_does_not_know():
    assert isinstance(likelihoods.build(likelihoods.Categorical(3)), likelihoods.Categorical)
    with pytest.raises(ValueError, match="'poisso' is unknown, expected one of bernoulli, gaussian"):
        likelihoods.build("poisso")
    with pytest.raises(TypeError, match="need a name"):
        likelihoods.build(likelihoods.Bernoulli(), classes=3)
    with pytest.raises(ValueError, match="sigma is 'best'"):
        likelihoods.build("gaussian", sigma="best")
    with pytest.raises(ValueError, match="sigma is 0"):
        likelihoods.build("gaussian", sigma=0.0)
    with pytest.raises(ValueError, match="classes is 1"):
        likelihoods.build("categorical", classes=1)
    with pytest.raises(ValueError, match="levels is 1"):
        likelihoods.build("discretized_logistic", levels=1)
