"""The library's own models and loader, through the same door as everybody's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import ferrovae as fv
from evidence.profiling import peak_bytes
from ferrovae.evidence import active_units, estimate


@pytest.fixture
def vae():
    encoder = fv.nn.MLPEncoder((1, 6, 6), 4, (32,), "tanh")
    decoder = fv.nn.MLPDecoder(4, (1, 6, 6), (32,), "tanh")
    return fv.VAE(encoder, decoder)


@pytest.fixture
def x():
    return torch.bernoulli(torch.full((12, 1, 6, 6), 0.3))


def test_draws_are_the_same_bits_in_any_cut(vae, x):
    with torch.inference_mode():
        posterior, ids = vae.posterior(x), torch.arange(12)
        z, log_q = posterior.draw(60, seed=3, example_ids=ids)
        pieces = [posterior.draw(20, seed=3, first_sample=first, example_ids=ids) for first in (0, 20, 40)]
    assert torch.equal(z, torch.cat([piece[0] for piece in pieces]))
    assert torch.equal(log_q, torch.cat([piece[1] for piece in pieces]))


def test_vae_does_not_depend_on_chunks_or_on_the_loader(vae, x, monkeypatch):
    whole = estimate(vae, x, 700, seed=5)
    assert (whole.elbo < whole.log_px).all()
    monkeypatch.setitem(sys.modules["ferrovae.evidence.estimate"]._ROWS, "cpu", 90)
    cut = estimate(vae, x, 700, seed=5)
    torch.testing.assert_close(cut.log_px, whole.log_px, rtol=1e-5, atol=0)
    torch.testing.assert_close(cut.elbo, whole.elbo, rtol=1e-5, atol=0)
    loader = fv.data.Loader(fv.data.open(x.numpy()), 5, seed=1)
    calls = []
    loaded = estimate(vae, loader, 700, seed=5, progress=lambda *call: calls.append(call))
    assert sorted(loaded.index.tolist()) == list(range(12))
    assert loaded.index.tolist() != list(range(12)), "the loader shuffles"
    torch.testing.assert_close(loaded.log_px, whole.log_px[loaded.index], rtol=1e-5, atol=0)
    assert calls[-1] == (12 * 700, 12 * 700)


def test_vae_terms_agree_with_its_own_elbo(vae, x):
    result = estimate(vae, x, 4000)
    with torch.no_grad():
        closed_form = vae.posterior(x).kl().double()
    torch.testing.assert_close(result.kl, closed_form, rtol=0.05, atol=0.1)
    own = vae.elbo(x, num_samples=4000, seed=9).elbo.detach().double()
    assert ((result.elbo - own).abs() < 5 * 2**0.5 * result.elbo_standard_error).all()


def test_vae_is_measured_in_float64(vae, x):
    wide = estimate(vae.double(), x.double(), 300, seed=2)
    narrow = estimate(vae.float(), x, 300, seed=2)
    torch.testing.assert_close(narrow.log_px, wide.log_px, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_memory_of_the_operations_counts(backend, monkeypatch):
    """Also what the reference of an operation allocates inside it."""
    encoder = fv.nn.MLPEncoder((1, 28, 28), 8, (32,), "tanh")
    vae = fv.VAE(encoder, fv.nn.MLPDecoder(8, (1, 28, 28), (32,), "tanh"))
    monkeypatch.setitem(sys.modules["ferrovae.evidence.estimate"]._ROWS, "cpu", 1 << 20)
    budget = 8 * 2**20
    with (
        fv.use_backend(backend),
        torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        estimate(vae, torch.zeros(2, 1, 28, 28), 1000, memory_budget=budget)
    assert budget / 10 < peak_bytes(profile) <= budget


def test_a_unit_the_encoder_ignores_is_not_active(vae):
    x = torch.rand(64, 1, 6, 6)
    last = [module for module in vae.encoder.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= 30
        last.weight[1] = 0
    found = active_units(vae, x)
    assert found.variance[1] == 0
    assert found.count == 3


@pytest.mark.slow
def test_the_first_estimate_does_not_import_the_compiler():
    """Counting bytes under a dispatch mode imports all of Dynamo, seconds, unless told not to."""
    script = (
        "import sys, torch, ferrovae as fv\n"
        "vae = fv.VAE(fv.nn.MLPEncoder((1, 4, 4), 2), fv.nn.MLPDecoder(2, (1, 4, 4)))\n"
        "fv.evidence.estimate(vae, torch.zeros(1, 1, 4, 4), 5)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.slow
def test_a_compiled_decoder_works(vae, x):
    expected = estimate(vae, x, 50).log_px
    vae.decoder.compile(backend="aot_eager")
    torch.testing.assert_close(estimate(vae, x, 50).log_px, expected, rtol=1e-5, atol=0)


def test_vqvae_gives_the_bound_with_a_uniform_code_prior():
    model = fv.VQVAE(
        fv.nn.ConvEncoder2d((1, 8, 8), 4, downsample=4, width=8),
        fv.nn.ConvDecoder2d(4, (1, 8, 8), downsample=4, width=8),
        fv.nn.VectorQuantize(dim=4, codebook_size=16),
        likelihood="gaussian",
    )
    model.eval()
    x = torch.rand(5, 1, 8, 8)
    result = estimate(model, x, 100)
    with torch.no_grad():
        codes = model.encode(x)
        expected = model.likelihood(codes).log_prob(x).double() - codes[0].numel() * torch.tensor(16.0).log().double()
    torch.testing.assert_close(result.log_px, expected, rtol=1e-5, atol=0)
    assert result.point_mass.all()
    assert result.direction == "lower bound"
    assert "not an estimate" in " ".join(result.table().split())
