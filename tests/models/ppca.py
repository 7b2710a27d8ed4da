"""Probabilistic PCA in closed form, and the linear-Gaussian VAE whose ELBO is its log-likelihood.

p(z) = N(0, I_q), p(x|z) = N(W z + mu, s2 I). At the maximum of the likelihood W = U (L - s2 I)^(1/2) with the q
leading eigenpairs of the sample covariance and s2 the mean of the others (Tipping and Bishop 1999); the posterior
N(M^-1 W' (x - mu), s2 M^-1), M = W'W + s2 I, is then diagonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ferrovae import VAE, likelihoods


@dataclass(frozen=True)
class PPCA:
    """weight: (D, q); mean: (D,); variance: s2; all float64."""

    weight: torch.Tensor
    mean: torch.Tensor
    variance: float
    train_log_px: float

    @classmethod
    def fit(cls, x: torch.Tensor, *sizes: int) -> list[PPCA]:
        """The maximum-likelihood solution of x (N, D) for each q; `train_log_px` is its mean by the eigenvalues."""
        mean = x.double().mean(0)
        centred = x.double() - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        return [cls.of(mean, values.flip(0), vectors.flip(1), q) for q in sizes]

    @classmethod
    def of(cls, mean: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor, q: int) -> PPCA:
        """From the mean and the eigenpairs of the covariance, largest first."""
        dims = len(mean)
        variance = values[q:].mean().item()
        log_determinant = values[:q].log().sum().item() + (dims - q) * math.log(variance)
        return cls(
            vectors[:, :q] * (values[:q] - variance).sqrt(),
            mean,
            variance,
            -0.5 * (dims * math.log(2 * math.pi) + log_determinant + dims),
        )

    def log_px(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N,), nats, by the density of N(mu, W W' + s2 I)."""
        dims, q = self.weight.shape
        inner = self.weight.T @ self.weight + self.variance * torch.eye(q, dtype=torch.float64)
        factor = torch.linalg.cholesky(inner)
        centred = x.double() - self.mean
        explained = torch.linalg.solve_triangular(factor, self.weight.T @ centred.T, upper=False).square().sum(0)
        log_determinant = 2 * factor.diagonal().log().sum() + (dims - q) * math.log(self.variance)
        squares = (centred.square().sum(1) - explained) / self.variance
        return -0.5 * (dims * math.log(2 * math.pi) + log_determinant + squares)

    def vae(self, *, inflation: float = 1.0) -> VAE:
        """The same model as a float64 VAE, with the exact posterior, or one with `inflation` times its variance."""
        precision = self.weight.T @ self.weight + self.variance * torch.eye(self.weight.shape[1], dtype=torch.float64)
        inverse = torch.linalg.inv(precision)
        return VAE(
            LinearEncoder(inverse @ self.weight.T, self.mean, (inflation * self.variance * inverse.diagonal()).log()),
            LinearDecoder(self.weight, self.mean),
            likelihoods.Gaussian(math.sqrt(self.variance)),
        )


class LinearEncoder(nn.Module):
    """x (N, D) -> moments (N, 2 q): weight (x - mean), and the same log-variance for every x."""

    def __init__(self, weight: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.mean, self.logvar = nn.Parameter(weight), nn.Parameter(mean), nn.Parameter(logvar)
        self.latent_shape = tuple(logvar.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = (x - self.mean) @ self.weight.T
        return torch.cat((mean, self.logvar.expand_as(mean)), 1)


class LinearDecoder(nn.Module):
    """z (N, q) -> mean of x (N, D)."""

    def __init__(self, weight: torch.Tensor, mean: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.mean = nn.Parameter(weight), nn.Parameter(mean)
        self.data_shape = tuple(mean.shape)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.weight.T + self.mean
