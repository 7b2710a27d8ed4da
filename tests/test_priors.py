"""Priors: against torch's distributions, and their normalisation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributions import Independent, Normal

from ferrovae import priors


def test_standard_normal_is_torchs():
    ours, z = priors.StandardNormal((2, 3), dtype=torch.float64), torch.randn(5, 4, 2, 3, dtype=torch.float64)
    theirs = Independent(Normal(torch.zeros(2, 3, dtype=torch.float64), 1.0), 2)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)
    drawn = ours.sample((20_000,))
    assert drawn.shape == (20_000, 2, 3)
    assert drawn.dtype == torch.float64
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.var() - 1) < 0.03
    expanded = ours.expand((7,))
    assert expanded.sample((2,)).shape == (2, 7, 2, 3)
    assert expanded.log_prob(z[0, 0]).shape == (7,)


def test_uniform_codes_sum_to_one():
    prior = priors.UniformCodes(3, (2, 2))
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(-1, 2, 2)
    assert prior.log_prob(every).exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert prior.entropy().item() == pytest.approx(4 * math.log(3))
    drawn = prior.sample((5000,))
    assert drawn.shape == (5000, 2, 2)
    assert drawn.dtype == torch.int64
    assert (torch.bincount(drawn.flatten(), minlength=3) / 20_000 - 1 / 3).abs().max() < 0.02
    assert prior.log_prob(torch.full((1, 2, 2), 3)).item() == -math.inf
    assert prior.log_prob(torch.full((1, 2, 2), -1)).item() == -math.inf


def test_build_and_its_errors():
    assert priors.build("normal", (4,)).event_shape == (4,)
    assert priors.build("uniform", (7, 7), num_codes=256).event_shape == (7, 7)
    given = priors.StandardNormal((3,))
    assert priors.build(given, (3,)) is given
    with pytest.raises(ValueError, match=r"event shape is \(3,\), expected \(4,\)"):
        priors.build(given, (4,))
    with pytest.raises(ValueError, match="'vamp' is unknown"):
        priors.build("vamp", (4,))
    with pytest.raises(ValueError, match="num_codes is 0"):
        priors.UniformCodes(0, (2,))
    with pytest.raises(ValueError, match=r"StandardNormal\.log_prob: z is \(5, 4\), expected \(\.\.\., 3\)"):
        given.log_prob(torch.zeros(5, 4))
