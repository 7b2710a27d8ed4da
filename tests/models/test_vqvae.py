"""VQVAE: the four distributions, the bound against the enumerated evidence, and a training step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import ferrovae as fv
from ferrovae import likelihoods, priors
from ferrovae.models.vqvae import VQVAE
from ferrovae.nn import ConvDecoder2d, ConvEncoder2d, PointMass, VectorQuantize

SHAPE, DIM, SIZE = (1, 8, 8), 6, 5


def small_model(likelihood="gaussian", **options):
    encoder = ConvEncoder2d(SHAPE, DIM, downsample=4, width=8, residual_blocks=1)
    family = likelihoods.build(likelihood)
    decoder = ConvDecoder2d(DIM, SHAPE, downsample=4, width=8, residual_blocks=1, channels=family.channels)
    return VQVAE(encoder, decoder, VectorQuantize(DIM, SIZE, **options), likelihood)


def all_codes(size, grid):
    return torch.tensor(list(itertools.product(range(size), repeat=math.prod(grid)))).reshape(-1, *grid)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "categorical"])
def test_the_bound_is_below_the_enumerated_evidence(likelihood):
    model = small_model(likelihoods.Categorical(classes=4) if likelihood == "categorical" else likelihood).eval()
    x = torch.randint(4, (3, *SHAPE)) if likelihood == "categorical" else torch.rand(3, *SHAPE).round()
    with torch.no_grad():
        elbo, reconstruction, kl = model.elbo(x)
        z = all_codes(SIZE, model.grid)
        assert len(z) == SIZE**4
        log_joint = model.likelihood(z[:, None]).log_prob(x) + model.prior.log_prob(z)[:, None]  # (K^P, B)
        evidence = log_joint.double().logsumexp(0)
        assert (elbo.double() <= evidence).all()
        torch.testing.assert_close(kl, torch.full((3,), 4 * math.log(SIZE)))
        torch.testing.assert_close(elbo, reconstruction - kl)
        # the bound is the joint's own term at the encoder's codes
        place = (z[:, None] == model.encode(x)).flatten(2).all(-1)
        torch.testing.assert_close(elbo, log_joint[place.int().argmax(0), torch.arange(3)], rtol=1e-5, atol=1e-4)
        # and when the decoder ignores z, every z explains x alike
        model.decoder.body[0].weight.zero_()
        exact = (model.likelihood(z[:, None]).log_prob(x) + model.prior.log_prob(z)[:, None]).logsumexp(0)
        torch.testing.assert_close(model.elbo(x).reconstruction, exact, rtol=1e-4, atol=1e-3)


def test_posterior_is_a_point_mass_and_prior_uniform():
    model = small_model()
    x = torch.rand(3, *SHAPE)
    before = [buffer.clone() for buffer in model.quantizer.buffers()]
    posterior, prior = model.posterior(x), model.prior
    assert all(torch.equal(one, two) for one, two in zip(before, model.quantizer.buffers(), strict=True))
    assert posterior.batch_shape == (3,)
    assert posterior.event_shape == prior.event_shape == (2, 2)
    z = posterior.sample((4,))
    assert z.shape == (4, 3, 2, 2)
    assert torch.equal(z[2], model.encode(x))
    assert torch.equal(posterior.log_prob(z), torch.zeros(4, 3))
    other = z.clone()
    other[1, 2, 0, 0] = (other[1, 2, 0, 0] + 1) % SIZE
    assert posterior.log_prob(other)[1, 2] == -math.inf
    torch.testing.assert_close(prior.log_prob(z), torch.full((4, 3), -4 * math.log(SIZE)))
    # KL(q || p) = E_q[log q - log p]
    torch.testing.assert_close((posterior.log_prob(z) - prior.log_prob(z))[0], model.elbo(x).kl.detach())
    assert torch.equal(posterior.entropy(), torch.zeros(3))
    assert posterior.expand((7, 3)).sample().shape == (7, 3, 2, 2)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_likelihood_takes_leading_dimensions(batch):
    model = small_model().eval()
    z = torch.randint(SIZE, (*batch, 2, 2))
    likelihood = model.likelihood(z)
    assert likelihood.batch_shape == batch
    assert likelihood.event_shape == SHAPE
    assert model.decode(z).shape == (*batch, *SHAPE)
    vectors = model.quantizer.codebook[z].movedim(-1, len(batch))
    assert vectors.shape == (*batch, DIM, 2, 2)
    torch.testing.assert_close(model.decode(vectors), model.decode(z), rtol=1e-4, atol=1e-5)
    if len(batch) == 2:
        torch.testing.assert_close(model.decode(z)[1], model.decode(z[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"channel_last": False}, {"accept_image_fmap": True}, {"codebook_dim": 3}, {"use_cosine_sim": True}],
)
def test_every_layout_of_the_quantizer_is_the_same_model(options):
    model = small_model(**options)
    reference = small_model(
        **{key: value for key, value in options.items() if key in ("codebook_dim", "use_cosine_sim")}
    )
    reference.load_state_dict(model.state_dict())
    x = torch.rand(4, *SHAPE)
    for one, two in zip(model.objective(x)[:2], reference.objective(x)[:2], strict=True):
        torch.testing.assert_close(one, two)
    model.eval()
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)))
    torch.testing.assert_close(
        model.elbo(x).reconstruction, model.likelihood(model.encode(x)).log_prob(x), rtol=1e-5, atol=1e-4
    )


def test_objective_is_in_nats_per_example():
    model = small_model(commitment_weight=0.25)
    x = torch.rand(4, *SHAPE)
    with torch.no_grad():
        vectors = model.encoder(x)
        codes = model.quantizer.codebook[model.encode(x)].movedim(-1, 1)
        commitment = 0.25 * (vectors - codes).square().flatten(1).sum(1).mean()
        elbo = model.elbo(x)
        histogram = torch.bincount(model.encode(x).flatten(), minlength=SIZE) / 16
    loss, reported, extra = model.objective(x)
    torch.testing.assert_close(extra["commitment"], commitment)
    torch.testing.assert_close(loss.detach(), commitment - elbo.reconstruction.mean())
    for one, two in zip(reported, elbo, strict=True):
        torch.testing.assert_close(one, two)
        assert not one.requires_grad
    torch.testing.assert_close(extra["perplexity"], torch.special.entr(histogram).sum().exp())
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.encoder.head.weight.grad.abs().sum() > 0
    weighted = model.eval().objective(x, beta=0.1, free_bits=2.0, seed=3, example_ids=torch.arange(4))
    torch.testing.assert_close(weighted.loss, model(x).loss)
    assert weighted.extra["commitment"] == 0


def test_the_objective_moves_the_codebook_only_in_training():
    model = small_model()
    x = torch.rand(4, *SHAPE)
    before = model.quantizer.codebook.clone()
    model.eval().objective(x)
    model.train().elbo(x)
    assert torch.equal(model.quantizer.codebook, before)
    model.objective(x)
    assert not torch.equal(model.quantizer.codebook, before)


def test_an_empty_batch():
    model = small_model(threshold_ema_dead_code=1)
    loss, elbo, extra = model.objective(torch.rand(0, *SHAPE))
    assert loss == 0
    assert elbo.elbo.shape == (0,)
    assert extra["perplexity"] == 1
    assert model.quantizer.codebook.isfinite().all()


def test_samples_repeat_under_a_seed():
    model = small_model("bernoulli").eval()
    state = torch.get_rng_state()
    first = model.sample(5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (5, *SHAPE)
    assert torch.equal(first, model.sample(5, seed=1))
    assert not torch.equal(first, model.sample(5, seed=2))
    assert ((first == 0) | (first == 1)).all()
    assert model.sample(2, mean=True).shape == (2, *SHAPE)


def test_the_grid_is_learned_from_the_first_batch_or_given():
    def vectors():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Unflatten(1, (4, 3)))

    def decoder():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.Unflatten(1, SHAPE))

    model = VQVAE(vectors(), decoder(), VectorQuantize(4, SIZE))
    with pytest.raises(ValueError, match="grid of codes is not known yet"):
        _ = model.prior
    assert model.encode(torch.rand(2, *SHAPE)).shape == (2, 3)
    assert model.prior.event_shape == (3,)
    assert VQVAE(vectors(), decoder(), VectorQuantize(4, SIZE), grid=(3,)).sample(2).shape == (2, *SHAPE)
    skewed = VQVAE(vectors(), decoder(), VectorQuantize(4, SIZE), prior=priors.UniformCodes(SIZE, (3,)))
    assert skewed.grid == (3,)


def test_what_does_not_fit():
    model = small_model()
    with pytest.raises(ValueError, match=r"z is \(3, 2\), expected \(..., 2, 2\)"):
        model.likelihood(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"z is torch.int32"):
        model.likelihood(torch.zeros(2, 2, dtype=torch.int32))
    for code in (-1, SIZE):
        with pytest.raises(ValueError, match=rf"z holds {code}, expected codes 0 .. 4"):
            model.likelihood(torch.full((2, 2), code))
    with pytest.raises(ValueError, match="expected 'uniform'"):
        VQVAE(model.encoder, model.decoder, model.quantizer, prior="normal")
    with pytest.raises(ValueError, match=r"the encoder returned \(2, 6, 2, 2\) .*expected \(2, 7, 2, 2\)"):
        VQVAE(model.encoder, model.decoder, VectorQuantize(7, SIZE)).encode(torch.rand(2, *SHAPE))
    x = torch.rand(3, *SHAPE)
    x[1, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="example 1 of x holds NaN"):
        model.objective(x)
    with pytest.raises(TypeError, match=r"codes are torch\.float32"):
        PointMass(torch.zeros(3, 2))


def test_it_learns_the_digits():
    """A short training makes reconstructions much better than the mean image, with many codes in use."""
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    x = torch.tensor(digits[:512], dtype=torch.float32)[:, None] / 16
    quantizer = VectorQuantize(8, 32, kmeans_init=True, threshold_ema_dead_code=1, commitment_weight=0.25)
    encoder = ConvEncoder2d(SHAPE, 8, downsample=4, width=16, residual_blocks=1)
    decoder = ConvDecoder2d(8, SHAPE, downsample=4, width=16, residual_blocks=1)
    model = fv.VQVAE(encoder, decoder, quantizer, likelihoods.Gaussian(sigma="optimal"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(120):
        optimizer.zero_grad()
        objective = model.objective(x[torch.arange(step * 128, step * 128 + 128) % 512])
        objective.loss.backward()
        optimizer.step()
    model.eval()
    error = (model.reconstruct(x) - x).square().mean()
    assert error < 0.6 * (x - x.mean(0)).square().mean()
    assert objective.extra["perplexity"] > 10
