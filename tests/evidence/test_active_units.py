"""Active units against their definition."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

from ferrovae.evidence import active_units


class Linear:
    """E_q[z|x] = scale * x, so that Var_x(E_q[z_d|x]) = scale_d^2 Var(x_d)."""

    def __init__(self, scale):
        self.scale = scale

    def posterior(self, x):
        return Independent(Normal(self.scale * x, 1.0), 1)


def test_counts_dimensions_whose_mean_moves():
    x = torch.randn(1500, 4, dtype=torch.float64) + 1e3
    scale = torch.tensor([1.0, 0.2, 0.05, 0.0], dtype=torch.float64)
    found = active_units(Linear(scale), x)
    torch.testing.assert_close(found.variance, x.var(0, correction=0) * scale**2)
    assert found.count == 2
    assert active_units(Linear(scale), x, threshold=1e-4).count == 3
    small = active_units(Linear(scale), x, memory_budget=20_000)
    torch.testing.assert_close(small.variance, found.variance)


def test_refuses_what_has_no_mean():
    class Codes:
        def posterior(self, x):
            distribution = Categorical(logits=x)
            distribution.__class__ = type("Codes", (Categorical,), {"mean": x.argmax(-1)})
            return distribution

    with pytest.raises(TypeError, match=r"posterior's mean is torch.int64; units of a discrete latent have none"):
        active_units(Codes(), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="x has no images"):
        active_units(Linear(torch.ones(2)), torch.empty(0, 2))
    with pytest.raises(TypeError, match="model is a object without posterior"):
        active_units(object(), torch.zeros(3, 4))
