"""The posterior: against torch's normal, its KL against quadrature, and its keyed draws."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Independent, Normal

from ferrovae.nn import DiagonalNormal


def posterior(batch=4, shape=(2, 3), dtype=torch.float64):
    return DiagonalNormal(torch.randn(batch, *shape, dtype=dtype), torch.randn(batch, *shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_it_is_torchs_normal(shape):
    ours = posterior(shape=shape)
    theirs = Independent(Normal(ours.mean, ours.stddev), len(shape))
    z = torch.randn(5, 4, *shape, dtype=torch.float64)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.variance, theirs.variance)
    standard = Independent(Normal(torch.zeros_like(ours.mean), 1.0), len(shape))
    torch.testing.assert_close(ours.kl(), torch.distributions.kl_divergence(theirs, standard))
    torch.testing.assert_close(ours.kl(per_dimension=True).reshape(4, -1).sum(1), ours.kl())
    expanded = ours.expand((5, 4))
    torch.testing.assert_close(expanded.log_prob(z), ours.log_prob(z))
    assert expanded.rsample((2,)).shape == (2, 5, 4, *shape)


def test_a_tiny_kl_does_not_cancel():
    tiny = torch.full((1, 1), 1e-5)
    truth = 0.5 * (1e-10 + 0.5e-10)  # mean^2 + logvar^2 / 2
    assert DiagonalNormal(tiny, tiny).kl().item() == pytest.approx(truth, rel=1e-2)


def test_draws_are_keyed_and_independent_of_chunks_and_batches():
    ours = posterior(dtype=torch.float32)
    z, log_q = ours.draw(6, seed=42)
    assert z.shape == (6, 4, 2, 3)
    assert log_q.shape == (6, 4)
    parts = [ours.draw(count, seed=torch.tensor([42]), first_sample=first) for first, count in ((0, 1), (1, 3), (4, 2))]
    assert torch.equal(z, torch.cat([part[0] for part in parts]))
    assert torch.equal(log_q, torch.cat([part[1] for part in parts]))
    half = DiagonalNormal(ours.mean[2:], ours.logvar[2:])
    assert torch.equal(z[:, 2:], half.draw(6, seed=42, example_ids=torch.tensor([2, 3]))[0])
    assert not torch.equal(z, ours.draw(6, seed=43)[0])


def test_log_q_comes_from_the_noise():
    """With sigma far below the spacing of float32 at the mean, (z - mean) / sigma is all rounding."""
    narrow = DiagonalNormal(torch.full((1, 50), 1000.0), torch.full((1, 50), -20.0))
    z, log_q = narrow.draw(2000, seed=1)
    entropy = -narrow.entropy().double()
    assert abs(log_q.double().mean() - entropy) <= 5 * log_q.double().std() / 2000**0.5
    assert (narrow.log_prob(z).mean() - entropy).abs() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_standard_normal_and_differentiable(dtype):
    ours = posterior(dtype=dtype)
    ours.mean.requires_grad_()
    ours.logvar.requires_grad_()
    z, log_q = ours.draw(5000, seed=0)
    eps = ((z - ours.mean) / ours.stddev).detach()
    assert eps.mean().abs() < 5 / eps.numel() ** 0.5
    assert (eps.var() - 1).abs() < 5 * (2 / eps.numel()) ** 0.5
    torch.testing.assert_close(log_q, ours.log_prob(z), rtol=1e-4, atol=1e-4)
    (z.sum() + log_q.sum()).backward()
    torch.testing.assert_close(ours.mean.grad, torch.full_like(ours.mean, 5000))
    expected = 0.5 * ours.stddev * eps.sum(0) - 2500  # log q at fixed noise: minus half of logvar
    torch.testing.assert_close(ours.logvar.grad, expected, rtol=1e-3, atol=1e-2)


def test_half_precision_becomes_float32_and_shapes_are_checked():
    half = DiagonalNormal(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16))
    assert half.mean.dtype == torch.float32
    with pytest.raises(ValueError, match=r"mean is \(2, 3\) and logvar \(2, 4\)"):
        DiagonalNormal(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"z is \(4,\)"):
        half.log_prob(torch.zeros(4))
    with pytest.raises(ValueError, match=r"batch shape is \(5, 2\), expected \(B,\)"):
        half.expand((5, 2)).draw(1, seed=0)
