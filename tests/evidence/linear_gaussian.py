"""A model whose log p(x) is known: z ~ N(0, I), x = W z + sigma eps; its posterior is right or wrong on purpose."""

from __future__ import annotations

import math

import torch
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal


def keyed_normal(seed, ids, first, samples, dims):
    """Standard normal noise [samples, B, dims], float64, a function of (seed, id, sample, dimension) alone."""

    def mix(value):  # splitmix64
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return value ^ ((value >> 31) & ((1 << 33) - 1))

    sample = torch.arange(first, first + samples)[:, None, None]
    key = mix(mix(mix(ids[:, None] + 7919 * seed) + sample) + torch.arange(dims))
    uniform = (((key >> 11) & ((1 << 53) - 1)).double() + 0.5) / 2.0**53
    return torch.special.ndtri(uniform)


class Gaussian(Distribution):
    """N(mean [B, Z], S S') whose draws do not depend on how they are cut."""

    def __init__(self, mean, root, logdet):
        super().__init__(mean.shape[:1], mean.shape[1:], validate_args=False)
        self.mean_, self.root = mean, root
        self.constant = logdet + 0.5 * mean.shape[1] * math.log(2 * math.pi)

    @property
    def mean(self):
        return self.mean_

    def draw(self, num_samples, *, seed, first_sample=0, example_ids=None):
        eps = keyed_normal(seed, example_ids, first_sample, num_samples, self.mean_.shape[1]).to(self.mean_.dtype)
        return self.mean_ + eps @ self.root.T, -0.5 * eps.square().sum(-1) - self.constant


class LinearGaussian:
    """The posterior's covariance is `inflation` times the true one, turned by `rotation` [Z, Z]; 1 and none: exact."""

    def __init__(self, latent, dims, *, sigma=0.5, inflation=1.0, rotation=None, dtype=torch.float64, keyed=True):
        generator = torch.Generator().manual_seed(latent)
        self.weight = torch.randn(dims, latent, generator=generator, dtype=torch.float64)
        self.sigma, self.inflation, self.keyed = sigma, inflation, keyed
        inner = self.weight.T @ self.weight + sigma**2 * torch.eye(latent, dtype=torch.float64)
        self.covariance = sigma**2 * torch.linalg.inv(inner)
        turned = self.covariance if rotation is None else rotation @ self.covariance @ rotation.T
        self.q_covariance = inflation * turned
        self.to_mean = (self.weight @ self.covariance / sigma**2).to(dtype)
        self.root = torch.linalg.cholesky(self.q_covariance).to(dtype)
        self.logdet = float(self.root.logdet())
        self.evidence = MultivariateNormal(
            torch.zeros(dims, dtype=torch.float64),
            self.weight @ self.weight.T + sigma**2 * torch.eye(dims, dtype=torch.float64),
        )
        self.weight = self.weight.to(dtype)
        self.prior = Independent(Normal(torch.zeros(latent, dtype=dtype), torch.ones(latent, dtype=dtype)), 1)

    def posterior(self, x):
        mean = x @ self.to_mean
        return Gaussian(mean, self.root, self.logdet) if self.keyed else MultivariateNormal(mean, scale_tril=self.root)

    def likelihood(self, z):
        return Independent(Normal(z @ self.weight.T, self.sigma), 1)

    def sample(self, count):
        return self.evidence.sample((count,)).to(self.weight.dtype)

    def log_px(self, x):
        return self.evidence.log_prob(x.double())

    def gap(self):
        """KL(q(z|x) || p(z|x)), the same for every x."""
        ratio = torch.linalg.solve(self.covariance, self.q_covariance)
        return float(0.5 * (ratio.trace() - len(ratio) - ratio.logdet()))
