"""The variational autoencoder: prior, likelihood, posterior, and the bound they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ferrovae import likelihoods, priors
from ferrovae.likelihoods import Factorized, Likelihood
from ferrovae.models.elbo import Elbo, Objective, free_kl
from ferrovae.nn.distributions import DiagonalNormal
from ferrovae.ops import reparameterize_kl, reparameterize_kl_from_moments

__all__ = ["VAE"]


class VAE(nn.Module):
    """p(x, z) = p(z) p(x|z) with a diagonal normal q(z|x) (Kingma and Welling 2014).

    Args:
        encoder: x (B, *data) -> moments, mean and log-variance along dim 1: (B, 2 D) or (B, 2 C, H, W); a pair
            (mean, logvar) will do as well.
        decoder: z (N, *latent) -> the likelihood's parameters, stacked along dim 1.
        likelihood: a name of `ferrovae.likelihoods`, or a `Likelihood`.
        prior: `"normal"`, or a `torch.distributions.Distribution` over z. The KL is in closed form for the former
            and the one-sample estimate log q(z|x) - log p(z) for the latter.
        latent_shape: shape of one z; by default the decoder's or encoder's attribute `latent_shape`, or what the
            first encoded batch shows.
        data_shape: shape of one x; by default the attribute `data_shape`, or what the decoder gives.

    Everything is in nats per example, summed over dimensions.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str | Likelihood = "bernoulli",
        prior: str | Distribution = "normal",
        *,
        latent_shape: Sequence[int] | None = None,
        data_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.likelihood_family = likelihoods.build(likelihood)
        if isinstance(prior, str) and prior != "normal":
            raise ValueError(f"VAE: prior is {prior!r}, expected 'normal' or a Distribution over z")
        self._prior = prior
        given = prior.event_shape if isinstance(prior, Distribution) else None
        self._latent_shape = _known("latent_shape", latent_shape or given, decoder, encoder)
        self._data_shape = _known("data_shape", data_shape, decoder, encoder)

    # the four distributions ------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one z; `ValueError` while nothing has told it."""
        if self._latent_shape is None:
            raise ValueError("VAE: the shape of z is not known yet: pass latent_shape= to VAE, or encode a batch first")
        return self._latent_shape

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one x; `ValueError` while nothing has told it."""
        if self._data_shape is None:
            raise ValueError("VAE: the shape of x is not known yet: pass data_shape= to VAE, or use a batch first")
        return self._data_shape

    @property
    def prior(self) -> Distribution:
        """p(z), on the model's device and in its dtype."""
        if isinstance(self._prior, Distribution):
            return priors.build(self._prior, self.latent_shape)
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(()))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return priors.build("normal", self.latent_shape, dtype=dtype, device=like.device)

    def posterior(self, x: Tensor) -> DiagonalNormal:
        """q(z|x): batch shape (B,), event shape `latent_shape`."""
        moments = self._moments(x)
        return DiagonalNormal(*(moments if isinstance(moments, tuple) else moments.chunk(2, 1)))

    def likelihood(self, z: Tensor) -> Factorized:
        """p(x|z): z (*batch, *latent) -> batch shape `batch`, event shape that of one x.

        `batch` is (B,), (S, B) or anything else, also empty.

        Raises:
            ValueError: z does not end in `latent_shape`, or the decoder's output has the wrong shape.
        """
        latent = self.latent_shape
        cut = z.ndim - len(latent)
        if cut < 0 or z.shape[cut:] != latent:
            raise ValueError(f"VAE.likelihood: z is {tuple(z.shape)}, expected (..., {', '.join(map(str, latent))})")
        batch = z.shape[:cut]
        parameters = self.decoder(z.reshape(math.prod(batch), *latent))
        self._check_parameters(parameters, math.prod(batch))
        parameters = parameters.reshape(*batch, *parameters.shape[1:])
        return self.likelihood_family(parameters, parameters.ndim - len(batch))

    # the bound -------------------------------------------------------------------------------------------------

    def elbo(
        self,
        x: Tensor,
        *,
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
        example_ids: Tensor | None = None,
    ) -> Elbo:
        """The ELBO of every example, with the reconstruction estimated from one z, or the mean of `num_samples`.

        x: (B, *data). `seed` and `example_ids` (int64 (B,), default: position in the batch) fix the noise on every
        device and in every batching; without a seed it is drawn from torch's generator.
        """
        reconstruction, kl = self._terms(x, seed, example_ids, num_samples, "example")
        return Elbo(reconstruction - kl, reconstruction, kl)

    def objective(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        seed: int | Tensor | None = None,
        example_ids: Tensor | None = None,
    ) -> Objective:
        """What training minimises: the batch mean of beta * KL - E_q[log p(x|z)].

        Args:
            x: (B, *data); an empty batch has loss 0.
            beta: weight of the KL, for its warm-up.
            free_bits: nats of KL that every latent dimension may have for nothing, on the mean of the batch
                (`free_kl`). Needs the closed-form KL, so the normal prior.
            seed, example_ids: as of `elbo`.
        """
        if free_bits > 0:
            if isinstance(self._prior, Distribution):
                raise ValueError("VAE.objective: free_bits needs prior='normal', whose KL is known per dimension")
            reconstruction, per_dimension = self._terms(x, seed, example_ids, None, "element")
            kl = per_dimension.flatten(1).sum(1)
            price = free_kl(per_dimension, free_bits)
        else:
            reconstruction, kl = self._terms(x, seed, example_ids, None, "example")
            price = kl.sum() / max(kl.shape[0], 1)
        loss = beta * price - reconstruction.sum() / max(reconstruction.shape[0], 1)
        detached = (reconstruction - kl).detach(), reconstruction.detach(), kl.detach()
        return Objective(loss, Elbo(*detached), self.likelihood_family.scalars())

    def forward(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        seed: int | Tensor | None = None,
        example_ids: Tensor | None = None,
    ) -> Objective:
        """`objective`, under the name that wrappers such as `DistributedDataParallel` call."""
        return self.objective(x, beta=beta, free_bits=free_bits, seed=seed, example_ids=example_ids)

    # what people do with it ------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """The posterior mean: (B, *data) -> (B, *latent)."""
        return self.posterior(x).mean

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's mean: (*batch, *latent) -> (*batch, *data)."""
        return self.likelihood(z).mean

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)): (B, *data)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def sample(self, num_samples: int = 1, *, mean: bool = False, seed: int | None = None) -> Tensor:
        """Draws from p(x): z from the prior, then x from the likelihood; (num_samples, *data).

        mean: give the likelihood's mean of each z, which looks smoother and is no sample of x.
        seed: makes the draw repeatable on one device, and leaves torch's generators as they were.
        """
        prior = self.prior
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        with torch.random.fork_rng([device] if device.type != "cpu" else [], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            likelihood = self.likelihood(prior.sample(torch.Size((num_samples,))))
            return likelihood.mean if mean else likelihood.sample()

    # ------------------------------------------------------------------------------------------------------------

    def _terms(
        self,
        x: Tensor,
        seed: int | Tensor | None,
        example_ids: Tensor | None,
        num_samples: int | None,
        kl_reduction: str,
    ) -> tuple[Tensor, Tensor]:
        """E_q[log p(x|z)] (B,), and the KL: (B,), or (B, *latent) for `kl_reduction="element"`."""
        moments = self._moments(x)
        options: dict[str, Any] = {"num_samples": num_samples, "kl_reduction": kl_reduction}
        options |= {"seed": seed, "example_ids": example_ids}
        if isinstance(moments, tuple):
            z, kl = reparameterize_kl(*moments, **options)
        else:
            z, kl = reparameterize_kl_from_moments(moments, dim=1, **options)
        likelihood = self.likelihood(z)
        if x.shape[1:] != likelihood.event_shape:
            raise ValueError(
                f"VAE: the decoder describes x of shape {tuple(likelihood.event_shape)}, but x is {tuple(x.shape)}"
            )
        reconstruction = likelihood.log_prob(x)
        if isinstance(self._prior, Distribution):
            posterior = DiagonalNormal(*(moments if isinstance(moments, tuple) else moments.chunk(2, 1)))
            kl = posterior.log_prob(z) - self.prior.log_prob(z)
        if num_samples is not None:
            reconstruction = reconstruction.mean(0)
            kl = kl.mean(0) if kl.ndim > 1 and isinstance(self._prior, Distribution) else kl
        return reconstruction, kl

    def _moments(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The encoder's output, checked, at least float32."""
        if self._data_shape is not None and x.shape[1:] != self._data_shape:
            expected = ", ".join(map(str, ("B", *self._data_shape)))
            raise ValueError(f"VAE: x is {tuple(x.shape)}, expected ({expected})")
        if self.likelihood_family.validate_args and not torch.compiler.is_compiling():
            self._check_finite(x)
        output = self.encoder(self.likelihood_family.features(x))
        if isinstance(output, tuple | list):
            if len(output) != 2 or output[0].shape != output[1].shape:
                shapes = [tuple(part.shape) for part in output]
                raise ValueError(f"VAE: the encoder returned {shapes}, expected a mean and a logvar of one shape")
            mean, logvar = (_single(part) for part in output)
            self._check_latent(x, mean.shape)
            return mean, logvar
        if output.ndim < 2 or output.shape[1] % 2:
            raise ValueError(
                f"VAE: the encoder returned {tuple(output.shape)} for x {tuple(x.shape)}, expected an even number of "
                "channels on dim 1: the mean, then the log-variance"
            )
        self._check_latent(x, (output.shape[0], output.shape[1] // 2, *output.shape[2:]))
        return _single(output)

    def _check_latent(self, x: Tensor, shape: Sequence[int]) -> None:
        if shape[0] != x.shape[0] or self._latent_shape not in (None, tuple(shape[1:])):
            wanted = "" if self._latent_shape is None else f" and z of shape {self._latent_shape}"
            raise ValueError(
                f"VAE: the encoder's mean is {tuple(shape)}, expected {x.shape[0]} examples as in x{wanted}"
            )
        if self._latent_shape is None:
            self._latent_shape = tuple(shape[1:])

    def _check_parameters(self, parameters: Tensor, count: int) -> None:
        per_channel = self.likelihood_family.channels
        if parameters.ndim < 2 or parameters.shape[0] != count or parameters.shape[1] % per_channel:
            raise ValueError(
                f"VAE: the decoder returned {tuple(parameters.shape)} for {count} z, expected ({count}, "
                f"{per_channel} * channels, ...): {self.likelihood_family.name} takes {per_channel} parameters "
                "per channel of x"
            )
        if self._data_shape is not None:
            expected = (count, per_channel * self._data_shape[0], *self._data_shape[1:])
            if parameters.shape != expected:
                raise ValueError(
                    f"VAE: the decoder returned {tuple(parameters.shape)}, expected {expected}: "
                    f"{self.likelihood_family.name} takes {per_channel} parameters per channel of x {self._data_shape}"
                )
        else:
            self._data_shape = (parameters.shape[1] // per_channel, *parameters.shape[2:])

    @staticmethod
    def _check_finite(x: Tensor) -> None:
        """Before the encoder sees it: a NaN would stay in the statistics of a normalisation layer."""
        if not x.is_floating_point() or bool(x.sum().isfinite()):
            return
        bad = x.isnan().flatten(1).any(1)
        if bool(bad.any()):
            raise ValueError(f"VAE: example {int(bad.nonzero()[0])} of x holds NaN")


def _single(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _known(name: str, given: Sequence[int] | None, *modules: nn.Module) -> tuple[int, ...] | None:
    """The shape given, or the first one a module knows."""
    for shape in (given, *(getattr(module, name, None) for module in modules)):
        if shape is not None:
            return tuple(int(size) for size in shape)
    return None
