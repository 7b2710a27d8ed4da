"""`estimate` on any model: independent of how the work is cut, within its memory, and clear about what is wrong."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from evidence.linear_gaussian import LinearGaussian
from evidence.profiling import peak_bytes
from ferrovae.evidence import active_units, estimate
from ferrovae.evidence.memory import LiveBytes, largest_chunk


class Batch(NamedTuple):
    x: torch.Tensor
    label: None
    index: torch.Tensor
    valid: torch.Tensor


class Network(nn.Module):
    """A user's model in the fewest lines: no `draw`, dropout that must be off."""

    def __init__(self, latent=3, dims=20, width=16):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(dims, width), nn.Dropout(0.5), nn.Tanh(), nn.Linear(width, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.Tanh(), nn.Linear(width, dims))
        self.prior = Independent(Normal(torch.zeros(latent), torch.ones(latent)), 1)

    def posterior(self, x):
        return Independent(Normal(self.encoder(x), 0.9), 1)

    def likelihood(self, z):
        return Independent(Bernoulli(logits=self.decoder(z)), 1)


class PointMass(Distribution):
    """q(z|x) of a VQ-VAE: codes [B, P]."""

    def __init__(self, codes):
        super().__init__(codes.shape[:1], codes.shape[1:], validate_args=False)
        self.codes = codes

    def sample(self, sample_shape=()):
        return self.codes.expand(*sample_shape, *self.codes.shape)

    def log_prob(self, value):
        return (value == self.codes).all(-1).double().log()


class UniformCodes(Distribution):
    def __init__(self, codes, places):
        super().__init__(torch.Size(), torch.Size([places]), validate_args=False)
        self.log_mass = -places * math.log(codes)

    def log_prob(self, value):
        return torch.full(value.shape[:-1], self.log_mass, dtype=torch.float64)


class Quantized:
    """x in R^2 is coded by the signs of its coordinates."""

    prior = UniformCodes(2, 2)

    def posterior(self, x):
        return PointMass((x > 0).long())

    def likelihood(self, z):
        return Independent(Normal(2.0 * z.double() - 1.0, 0.5), 1)


def run_with(monkeypatch, rows, *args, **kwargs):
    """`estimate` with passes of `rows` decoder rows."""
    import sys

    monkeypatch.setitem(sys.modules["ferrovae.evidence.estimate"]._ROWS, "cpu", rows)
    return estimate(*args, **kwargs)


def test_results_do_not_depend_on_the_chunks(monkeypatch):
    model = LinearGaussian(4, 9, inflation=1.5)
    x = model.sample(23)
    reference = run_with(monkeypatch, 1 << 20, model, x, 300, seed=7)
    for rows in (5, 64, 256, 1000):
        if rows == 5:
            part = run_with(monkeypatch, rows, model, x[:2], 300, seed=7)
        else:
            part = run_with(monkeypatch, rows, model, x, 300, seed=7)
        for name in ("log_px", "elbo", "reconstruction", "kl", "standard_error", "ess", "khat"):
            found, expected = getattr(part, name), getattr(reference, name)[: len(part)]
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, equal_nan=True)
    other = estimate(model, x, 300, seed=8)
    assert not torch.allclose(other.log_px, reference.log_px, rtol=1e-6)


def test_a_loader_gives_what_its_tensor_gives():
    """Batches in another order, padded, numbered by dataset index: the same draws for the same image."""
    model = LinearGaussian(4, 9, inflation=1.5)
    x = model.sample(10)
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 0, 0])
    valid = torch.arange(12) < 10
    loader = [Batch(x[order[i : i + 4]], None, order[i : i + 4], valid[i : i + 4]) for i in (0, 4, 8)]
    whole, batched = estimate(model, x, 200), estimate(model, loader, 200)
    assert torch.equal(batched.index, order[:10])
    torch.testing.assert_close(batched.log_px, whole.log_px[order[:10]], rtol=1e-9, atol=0)
    torch.testing.assert_close(batched.khat, whole.khat[order[:10]], rtol=1e-7, atol=1e-9)


def test_a_plain_module_is_measured_in_evaluation_mode_and_left_as_it_was():
    model = Network()
    model.decoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    x = torch.bernoulli(torch.full((7, 20), 0.3))
    state = torch.get_rng_state()
    first, second = estimate(model, x, 2000, seed=1), estimate(model, x, 2000, seed=1)
    assert torch.equal(first.log_px, second.log_px)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is untouched"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert (first.elbo <= first.log_px).all()
    # The truth by a grid over the three latent dimensions.
    axis = torch.linspace(-5, 5, 31)
    z = torch.cartesian_prod(axis, axis, axis).unsqueeze(1)
    with torch.no_grad():
        model.eval()
        log_p = model.likelihood(z).log_prob(x) + model.prior.log_prob(z)
    truth = log_p.double().logsumexp(0) + 3 * math.log(10 / 30)
    assert first.reliable.all()
    assert ((first.log_px - truth).abs() < 4.5 * first.standard_error).all()
    assert not first.log_px.is_inference()


def test_memory_stays_within_the_budget_for_any_number_of_samples(monkeypatch):
    """A wide decoder, many samples, passes as large as allowed: the peak is counted by torch's own profiler."""
    budget = 4 * 2**20
    model = Network(width=2000)
    x = torch.bernoulli(torch.full((3, 20), 0.3))

    def peak(samples):
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run_with(monkeypatch, 1 << 20, model, x, samples, memory_budget=budget)
        return peak_bytes(profile)

    few, many = peak(200), peak(3000)
    assert budget / 10 < few <= budget, "the measure sees the passes, and they are not needlessly small"
    assert many <= budget
    assert 5 * budget < 3000 * 2000 * 4, "all samples at once would not fit"


def test_a_budget_too_small_for_one_sample_is_an_error():
    with pytest.raises(ValueError, match=r"memory_budget is 100 bytes, but one image with one sample takes \d+"):
        estimate(Network(), torch.zeros(2, 20), 10, memory_budget=100)
    with pytest.raises(ValueError, match="active_units: memory_budget is 10 bytes"):
        active_units(Network(), torch.zeros(2, 20), memory_budget=10)


def test_live_bytes_counts_what_is_alive_at_one_time():
    before = torch.zeros(1000)
    with LiveBytes() as counter:
        a = before + 1  # 4,000 bytes
        b = a.view(10, 100).T  # a view costs nothing, nor does what was there before
        c = torch.cat([b.reshape(-1), before])  # the reshape copies: 4,000, then 8,000
        del a, b
        assert counter.live == 8000
        del c
        assert counter.live == 0
    assert counter.peak == 16_000


@pytest.mark.parametrize(("constant", "per_row"), [(0, 100), (5000, 1), (5000, 500)])
def test_largest_chunk_uses_the_budget_but_never_more(constant, per_row):
    def step(rows):
        return torch.zeros(constant), torch.zeros(per_row * rows)

    budget = 400_000
    rows = largest_chunk(step, 1 << 20, budget, "budget")
    used = 4 * (constant + per_row * rows)
    assert budget / 7 < used <= budget
    assert largest_chunk(step, 7, budget, "budget") == 7


def test_point_mass_posterior_gives_the_bound_from_one_draw():
    x = torch.tensor([[0.9, -1.2], [0.1, 0.3], [-3.0, 2.0]], dtype=torch.float64)
    result = estimate(Quantized(), x, 1000)
    expected = Independent(Normal(x.sign(), 0.5), 1).log_prob(x) - 2 * math.log(2)
    torch.testing.assert_close(result.log_px, expected)
    torch.testing.assert_close(result.elbo, expected)
    torch.testing.assert_close(result.kl, torch.full_like(expected, 2 * math.log(2)))
    assert result.point_mass.all()
    assert not result.exact.any(), "its weights are constant, but codes are left out"
    assert not result.reliable.any()
    assert result.standard_error.isnan().all()
    assert result.direction == "lower bound"
    torch.testing.assert_close(result.bits_per_dim(), -expected / (2 * math.log(2)))
    # Left-out codes only add: the bound lies below the enumeration.
    codes = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0])).double()
    exact = Independent(Normal(codes[:, None], 0.5), 1).log_prob(x).logsumexp(0) - 2 * math.log(2)
    assert (result.log_px < exact).all()


def test_progress_counts_every_weight():
    for model, x in ((LinearGaussian(2, 3), torch.zeros(5, 3, dtype=torch.float64)), (Quantized(), torch.ones(5, 2))):
        calls = []
        estimate(model, x, 300, progress=lambda done, total, calls=calls: calls.append((done, total)))
        assert calls[-1] == (1500, 1500)
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_no_images_and_one_dimensional_latents_work():
    assert len(estimate(Network(), torch.empty(0, 20), 10)) == 0
    assert estimate(Network(latent=1), torch.zeros(1, 20), 10).log_px.shape == (1,)


class Broken(LinearGaussian):
    """NaN or +inf in p(x|z) of images whose first value is 7."""

    def __init__(self, value):
        super().__init__(2, 3)
        self.value = value

    def likelihood(self, z):
        honest = super().likelihood(z)
        value = self.value

        class Likelihood(Independent):
            def log_prob(self, x):
                return torch.where(x[..., 0] == 7.0, value, super().log_prob(x))

        return Likelihood(honest.base_dist, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinite_weights_name_the_image(value):
    x = torch.zeros(40, 3, dtype=torch.float64)
    x[31] = 7.0
    with pytest.raises(ValueError, match=r"image 31, sample 0: log p\(x\|z\) = (nan|inf), log p\(z\) = -"):
        estimate(Broken(value), x, 100)


def test_zero_weights_are_fine_and_nan_data_is_named():
    x = torch.zeros(4, 3, dtype=torch.float64)
    x[2] = 7.0
    result = estimate(Broken(-math.inf), x, 100)
    assert result.log_px.isinf().tolist() == [False, False, True, False]
    assert not result.reliable[2]
    x[1, 2] = math.nan
    with pytest.raises(ValueError, match="x is NaN in image 1"):
        estimate(LinearGaussian(2, 3), x, 100)


def test_wrong_arguments_are_named():
    model, x = Network(), torch.zeros(2, 20)
    with pytest.raises(ValueError, match="samples is 0, expected at least 1"):
        estimate(model, x, 0)
    with pytest.raises(TypeError, match=r"samples is 2\.5, expected an integer"):
        estimate(model, x, 2.5)
    with pytest.raises(TypeError, match="seed is None, expected an integer"):
        estimate(model, x, 10, seed=None)
    with pytest.raises(TypeError, match="model is a Linear without posterior and likelihood and prior"):
        estimate(nn.Linear(2, 2), x, 10)
    with pytest.raises(TypeError, match=r"x is a int, expected a tensor or a ferrovae\.data.Loader"):
        estimate(model, 3, 10)
    with pytest.raises(TypeError, match=r"x yields Tensor, expected a ferrovae\.data.Loader"):
        estimate(model, [x], 10)


@pytest.mark.parametrize("part", ["posterior", "prior", "likelihood"])
def test_forgotten_event_dimensions_are_explained(part):
    model = Network()
    plain = {
        "posterior": lambda x: Normal(model.encoder(x), 0.9),
        "prior": Normal(torch.zeros(3), torch.ones(3)),
        "likelihood": lambda z: Bernoulli(logits=model.decoder(z)),
    }
    setattr(model, part, plain[part])
    with pytest.raises(ValueError, match=rf"log_prob of {part}.*expected \(samples, images\).*Independent"):
        estimate(model, torch.zeros(2, 20), 10)
