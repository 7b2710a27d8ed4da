"""`VAE`: the identities of its bound, the user's own modules, and what it says when something does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ferrovae as fv
from ferrovae import likelihoods
from ferrovae.models.elbo import free_kl

SHAPE = (2, 5, 7)
LATENT = 3


def build(likelihood="bernoulli", latent=LATENT, **options):
    family = likelihoods.build(likelihood, **options)
    encoder = fv.nn.MLPEncoder(SHAPE, latent, (16,))
    return fv.VAE(encoder, fv.nn.MLPDecoder(latent, SHAPE, (16,), channels=family.channels), family)


def plane():
    """A z of shape (2, 2, 2), from a user's plain convolutions: no attribute tells a shape."""
    encoder = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, padding=1))
    decoder = nn.Sequential(nn.Flatten(), nn.Linear(8, 70), nn.Unflatten(1, SHAPE))
    return fv.VAE(encoder, decoder)


def data(batch=6):
    return torch.bernoulli(torch.rand(batch, *SHAPE))


def test_the_bound_is_made_of_the_four_distributions():
    model, x = build(), data()
    elbo = model.elbo(x, seed=3)
    z, log_q = model.posterior(x).draw(1, seed=3)
    torch.testing.assert_close(elbo.reconstruction, model.likelihood(z[0]).log_prob(x))
    torch.testing.assert_close(elbo.kl, model.posterior(x).kl(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(elbo.elbo, elbo.reconstruction - elbo.kl)
    torch.testing.assert_close(log_q, model.posterior(x).log_prob(z), rtol=1e-4, atol=1e-4)
    assert model.prior.log_prob(z).shape == (1, 6)


def test_several_samples_are_the_mean_of_the_single_ones():
    model, x = build(), data()
    z, _ = model.posterior(x).draw(5, seed=9)
    expected = model.likelihood(z).log_prob(x).mean(0)
    torch.testing.assert_close(model.elbo(x, num_samples=5, seed=9).reconstruction, expected)


def test_the_noise_is_keyed_by_seed_and_example():
    model, x = build(), data()
    ids = torch.tensor([4, 7, 1, 0, 2, 9])
    whole = model.elbo(x, seed=5, example_ids=ids).elbo
    parts = [model.elbo(x[part], seed=torch.tensor([5]), example_ids=ids[part]).elbo for part in ([0, 1], [2, 3, 4, 5])]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-5)
    assert not torch.allclose(whole, model.elbo(x, seed=6, example_ids=ids).elbo)
    torch.manual_seed(1)
    first = model.elbo(x).elbo
    assert not torch.equal(first, model.elbo(x).elbo)
    torch.manual_seed(1)
    assert torch.equal(first, model.elbo(x).elbo)


def test_shapes_with_leading_sample_dimensions_and_empty_batches():
    for model in (build(), plane()):
        x = data()
        posterior = model.posterior(x)
        assert posterior.batch_shape == (6,)
        assert posterior.event_shape == model.latent_shape == model.prior.event_shape
        z = posterior.rsample((4,))
        likelihood = model.likelihood(z)
        assert likelihood.batch_shape == (4, 6)
        assert likelihood.event_shape == SHAPE == model.data_shape
        assert likelihood.log_prob(x).shape == (4, 6) == model.prior.log_prob(z).shape
        assert model.likelihood(z[0, 0]).batch_shape == ()
        assert model.likelihood(z[:0]).log_prob(x).shape == (0, 6)
        assert model.elbo(x[:0]).elbo.shape == (0,)
        assert model.objective(x[:0]).loss.item() == 0
        assert model.encode(x).shape == (6, *model.latent_shape)
        assert model.decode(z).shape == (4, 6, *SHAPE)
        assert model.reconstruct(x).shape == x.shape


def test_the_objective_is_the_negative_elbo_and_weighs_the_kl():
    model, x = build(), data()
    elbo = model.elbo(x, seed=1)
    plain, warm = (model.objective(x, beta=beta, seed=1) for beta in (1.0, torch.tensor(0.25)))
    torch.testing.assert_close(plain.loss, -elbo.elbo.mean())
    torch.testing.assert_close(warm.loss, (0.25 * elbo.kl - elbo.reconstruction).mean())
    torch.testing.assert_close(warm.elbo.elbo, elbo.elbo)
    assert not warm.elbo.elbo.requires_grad
    torch.testing.assert_close(model(x, seed=1).loss, plain.loss)


def test_free_bits_are_per_dimension_and_on_the_mean_of_the_batch():
    model, x = build(latent=4), data()
    with torch.no_grad():  # two dimensions with hardly any KL, two with much
        model.encoder.head.weight[[2, 3, 6, 7]] *= 0.01
        model.encoder.head.weight[[0, 1]] *= 20
    per_dimension = model.posterior(x).kl(per_dimension=True).mean(0)
    free = 0.3
    assert (per_dimension < free).sum() == 2
    result = model.objective(x, beta=0.5, free_bits=free, seed=2)
    price = 0.5 * per_dimension.clamp_min(free).sum() - result.elbo.reconstruction.mean()
    torch.testing.assert_close(result.loss, price)
    torch.testing.assert_close(result.elbo.kl, model.elbo(x, seed=2).kl, rtol=1e-5, atol=1e-5)
    kl = torch.tensor([[0.1, 3.0], [0.3, 1.0]], requires_grad=True)
    free_kl(kl, 0.5).backward()  # a dimension whose mean is below the allowance has no gradient
    torch.testing.assert_close(kl.grad, torch.tensor([[0.0, 0.5], [0.0, 0.5]]))


@pytest.mark.parametrize("name", ["bernoulli", "learned", "per_dimension", "optimal", "categorical", "logistic"])
def test_every_parameter_learns(name):
    options = {"categorical": {"classes": 4}, "logistic": {"levels": 4}}.get(name, {})
    family = {"bernoulli": name, "categorical": name, "logistic": "discretized_logistic"}.get(name, "gaussian")
    model = build(family, **(options or ({"sigma": name} if family == "gaussian" else {})))
    levels = torch.randint(4, (8, *SHAPE))
    x = {"unit": (levels > 1).float(), "integer": levels, "symmetric": levels * (2 / 3) - 1}[
        model.likelihood_family.data
    ]
    optimiser = torch.optim.Adam(model.parameters(), 3e-2)
    start = model.objective(x, seed=0).loss.item()
    for step in range(12):
        optimiser.zero_grad()
        result = model.objective(x, seed=step)
        result.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        optimiser.step()
    assert model.objective(x, seed=0).loss.item() < start - 1
    assert set(result.extra) == ({"sigma"} if name in ("learned", "optimal") else set())
    assert all(value.ndim == 0 and not value.requires_grad for value in result.extra.values())
    assert model.sample(3).shape == (3, *SHAPE)


def test_gradients_of_the_objective_in_float64():
    model = build("gaussian", sigma="per_dimension").double()
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    bias = model.encoder.head.bias.detach().clone().requires_grad_()

    def loss(value):
        call = {"encoder.head.bias": value}
        return torch.func.functional_call(model, call, (x,), {"seed": 4, "beta": 0.7}).loss

    assert torch.autograd.gradcheck(loss, (bias,), atol=1e-5)


@pytest.mark.parametrize(
    ("likelihood", "free_bits"),
    [("bernoulli", 0.0), ("bernoulli", 0.2), ("gaussian", 0.0), ("categorical", 0.0), ("discretized_logistic", 0.0)],
)
def test_it_compiles_whole(likelihood, free_bits):
    torch._dynamo.reset()
    model = build(likelihood, **({"sigma": "optimal"} if likelihood == "gaussian" else {}))
    twin, x = copy.deepcopy(model), torch.ones(4, *SHAPE)
    compiled = torch.compile(
        lambda x, seed: model.objective(x, seed=seed, free_bits=free_bits).loss, fullgraph=True, backend="aot_eager"
    )
    seed = torch.tensor([11])
    loss, eager = compiled(x, seed), twin.objective(x, seed=seed, free_bits=free_bits).loss
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-4)
    loss.backward()
    eager.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_compiles_without_a_seed():
    torch._dynamo.reset()
    model, x = build(), data()
    compiled = torch.compile(lambda x: model.objective(x).loss, fullgraph=True, backend="aot_eager")
    assert compiled(x).item() != compiled(x).item()


def test_under_bfloat16_autocast_the_likelihood_is_float32():
    for model in (build(), build("discretized_logistic", levels=2), plane()):
        x = data() * 2 - 1 if model.likelihood_family.data == "symmetric" else data()
        with torch.autocast("cpu", torch.bfloat16):
            assert model.decoder(torch.zeros(1, *model.posterior(x).event_shape)).dtype == torch.bfloat16
            result = model.objective(x, seed=1)
        assert result.loss.dtype == torch.float32
        assert result.elbo.elbo.dtype == torch.float32
        result.loss.backward()
        torch.testing.assert_close(result.loss, model.objective(x, seed=1).loss, rtol=0.02, atol=0.1)


def test_an_encoder_may_return_a_pair():
    class Pair(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return self.encoder(x).chunk(2, 1)

    model, x = build(), data()
    pair = fv.VAE(Pair(model.encoder), model.decoder)
    torch.testing.assert_close(pair.elbo(x, seed=1), model.elbo(x, seed=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pair.encode(x), model.encode(x))


def test_another_prior_is_sampled():
    """KL estimated from z: under the standard normal its mean is the closed form."""
    model, x = build(), data()
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(LATENT), 1.0), 1)
    other = fv.VAE(model.encoder, model.decoder, prior=normal)
    draws = torch.stack([other.elbo(x, num_samples=100, seed=seed).kl for seed in range(20)])
    assert ((draws.mean(0) - model.posterior(x).kl()).abs() <= 5 * draws.std(0) / 20**0.5).all()
    assert other.prior is normal
    assert other.sample(2).shape == (2, *SHAPE)
    assert other.objective(x).loss.requires_grad
    with pytest.raises(ValueError, match="free_bits needs prior='normal'"):
        other.objective(x, free_bits=0.1)


def test_samples_are_repeatable_and_means_are_asked_for():
    model = build()
    state = torch.get_rng_state()
    draws = model.sample(50, seed=3)
    assert torch.equal(draws, model.sample(50, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    means = model.sample(50, mean=True, seed=3)
    assert ((means > 0) & (means < 1)).all()
    assert not draws.requires_grad


def test_samples_follow_the_model():
    """With a decoder that ignores z, sample() has the likelihood's own mean."""
    model = build()
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.copy_(torch.linspace(-3, 3, 70))
    drawn = model.sample(4000).mean(0).flatten()
    torch.testing.assert_close(drawn, torch.linspace(-3, 3, 70).sigmoid(), rtol=0, atol=0.04)


class Fixed(nn.Module):
    """Returns a tensor of the given shape behind the batch dimension, whatever comes in."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, value):
        return value.new_zeros(len(value), *self.shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fv.VAE(Fixed(7), Fixed(*SHAPE)),
            r"encoder returned \(6, 7\) for x \(6, 2, 5, 7\), expected an even",
        ),
        (lambda: fv.VAE(Fixed(), Fixed(*SHAPE)), r"the encoder returned \(6,\)"),
        (lambda: fv.VAE(Fixed(8), Fixed(*SHAPE), latent_shape=(3,)), r"mean is \(6, 4\), expected 6 .* shape \(3,\)"),
        (
            lambda: fv.VAE(Fixed(8), Fixed(2, 5, 6)),
            r"describes x of shape \(2, 5, 6\), but x is \(6, 2, 5, 7\)",
        ),
        (
            lambda: fv.VAE(Fixed(8), Fixed(2, 5, 6), data_shape=SHAPE),
            r"the decoder returned \(6, 2, 5, 6\), expected \(6, 2, 5, 7\): bernoulli takes 1 ",
        ),
        (
            lambda: fv.VAE(Fixed(8), Fixed(3, 5, 7), "discretized_logistic"),
            r"the decoder returned \(6, 3, 5, 7\) for 6 z, .*discretized_logistic takes 2 parameters per channel of x",
        ),
        (
            lambda: fv.VAE(Fixed(8), Fixed(*SHAPE), data_shape=(2, 5)),
            r"x is \(6, 2, 5, 7\), expected \(B, 2, 5\)",
        ),
        (lambda: fv.VAE(Fixed(8), Fixed(*SHAPE), prior="uniform"), "prior is 'uniform', expected 'normal'"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make().elbo(data())


def test_shapes_nobody_told_are_asked_for():
    model = plane()
    with pytest.raises(ValueError, match="shape of z is not known yet: pass latent_shape="):
        model.sample(2)
    with pytest.raises(ValueError, match="shape of x is not known yet"):
        _ = model.data_shape
    model.elbo(data())
    assert model.sample(2).shape == (2, *SHAPE)
    with pytest.raises(ValueError, match=r"z is \(3, 2, 2\), expected \(\.\.\., 2, 2, 2\)"):
        model.likelihood(torch.zeros(3, 2, 2))


def test_bad_examples_are_named_before_they_reach_the_encoder():
    x = data()
    x[4, 1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="VAE: example 4 of x holds NaN"):
        build().elbo(x)
    with pytest.raises(ValueError, match=r"bernoulli: example 2 of x holds 3, which is outside \[0, 1\]"):
        build().elbo(torch.where(torch.arange(6)[:, None, None, None] == 2, 3.0, data()))


def test_a_state_dict_round_trip():
    model, other, x = build("gaussian", sigma="optimal"), build("gaussian", sigma="optimal"), data()
    model.objective(x)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval().elbo(x, seed=1), other.eval().elbo(x, seed=1), rtol=0, atol=0)
