"""The vector-quantized autoencoder: z is a grid of codes, and q(z|x) puts all its mass on one grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ferrovae import likelihoods, priors
from ferrovae.likelihoods import Factorized, Likelihood
from ferrovae.models.elbo import Elbo, Objective
from ferrovae.models.quantizing import GridQuantizer, Quantized
from ferrovae.nn.point_mass import PointMass
from ferrovae.nn.quantizers.code_statistics import perplexity

__all__ = ["VQVAE"]


class VQVAE(nn.Module):
    """p(x, z) = p(z) p(x|z) over codes z in {0 .. K - 1}^P (van den Oord et al., 2017, arXiv:1711.00937).

    Args:
        encoder: x (B, *data) -> vectors (B, D, *grid); P is the number of places of the grid, times the stages of a
            residual quantizer.
        decoder: vectors (N, D, *grid) -> the likelihood's parameters, stacked along dim 1.
        quantizer: a layer of `ferrovae.nn` (or of vector-quantize-pytorch) that gives one integer below K for each
            place, or for each place and stage: `VectorQuantize` in any of its layouts, `ResidualVQ`, `FSQ`, `LFQ`,
            `SimVQ`, ...
        likelihood: a name of `ferrovae.likelihoods`, or a `Likelihood`.
        prior: `"uniform"`, or a `torch.distributions.Distribution` over int64 z (*grid, *stages).
        grid: shape of the places; by default the encoder's or decoder's attribute `grid`, or what the first encoded
            batch shows.

    Everything is in nats per example, summed over dimensions. q(z|x) is a point mass, so KL(q(z|x) || p(z)) is
    -log p(z) of its codes: P log K under the uniform prior, and the ELBO a bound on log p(x), the log of a sum of K^P
    terms, by its largest term.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        quantizer: nn.Module,
        likelihood: str | Likelihood = "gaussian",
        prior: str | Distribution = "uniform",
        *,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.quantizer = encoder, decoder, quantizer
        stages = len(self._codes.stages)
        self.likelihood_family = likelihoods.build(likelihood)
        if isinstance(prior, str) and prior != "uniform":
            raise ValueError(f"VQVAE: prior is {prior!r}, expected 'uniform' or a Distribution over codes")
        self._prior = prior
        given = prior.event_shape[: len(prior.event_shape) - stages] if isinstance(prior, Distribution) else None
        known = (grid, given, getattr(encoder, "grid", None), getattr(decoder, "grid", None))
        self._grid = next((tuple(int(size) for size in shape) for shape in known if shape is not None), None)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the places; `ValueError` while nothing has told it."""
        if self._grid is None:
            raise ValueError("VQVAE: the grid of codes is not known yet: pass grid= to VQVAE, or encode a batch first")
        return self._grid

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one z: `grid`, and behind it the stages of a residual quantizer."""
        return self.grid + self._codes.stages

    @property
    def _codes(self) -> GridQuantizer:
        # Made anew, as the layer may be swapped for another.
        return GridQuantizer(self.quantizer)

    # the four distributions ------------------------------------------------------------------------------------

    @property
    def prior(self) -> Distribution:
        """p(z): event shape `code_shape`."""
        if isinstance(self._prior, Distribution):
            return priors.build(self._prior, self.code_shape)
        return priors.build("uniform", self.code_shape, num_codes=self._codes.num_codes, device=self._device())

    def posterior(self, x: Tensor) -> PointMass:
        """q(z|x): batch shape (B,), event shape `code_shape`. A codebook stays as it is, once k-means started it."""
        with torch.no_grad():
            return PointMass(self._quantize(x, freeze=True).codes)

    def likelihood(self, z: Tensor) -> Factorized:
        """p(x|z): codes z, int64 (*batch, *code_shape) -> batch shape `batch`, event shape that of one x.

        Raises:
            ValueError: z does not end in `code_shape`, holds a code that does not exist, or the decoder's output has
                the wrong shape.
            TypeError: z is not int64.
        """
        if z.dtype != torch.int64:
            raise TypeError(f"VQVAE.likelihood: z is {z.dtype}, expected torch.int64 codes")
        batch = self._batch_of(z, self.code_shape)
        if not torch.compiler.is_compiling() and z.numel():
            least, most = (int(value) for value in torch.aminmax(z))
            if least < 0 or most >= self._codes.num_codes:
                raise ValueError(
                    f"VQVAE.likelihood: z holds {least if least < 0 else most}, "
                    f"expected codes 0 .. {self._codes.num_codes - 1}"
                )
        return self._likelihood(self._vectors(z.reshape(math.prod(batch), *self.code_shape)), batch)

    # the bound -------------------------------------------------------------------------------------------------

    def elbo(
        self,
        x: Tensor,
        *,
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
        example_ids: Tensor | None = None,
    ) -> Elbo:
        """log p(x|z) + log p(z) at the z that the encoder chooses; in training with the quantizer's gradients.

        x: (B, *data). The other arguments are those of `VAE.elbo`; q(z|x) has no noise, so they change nothing.
        """
        return self._elbo(x, freeze=True)[0]

    def objective(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        seed: int | Tensor | None = None,
        example_ids: Tensor | None = None,
    ) -> Objective:
        """What training minimises: the batch mean of commitment - log p(x|z); in training the codebook takes its step.

        The commitment is the quantizer's loss, summed over the grid and the dimensions of a code like the other terms,
        not averaged. The KL does not depend on the networks, so it is not in the loss, and `beta` and `free_bits`,
        which weigh it, change nothing; nor do `seed` and `example_ids`, as q(z|x) has no noise.

        x: (B, *data); an empty batch has loss 0. `extra` holds `commitment` (nats per example) and `perplexity`, exp
        of the entropy of this batch's codes: 1 where all are equal, K where all codes are used alike (of a residual
        quantizer the mean over its stages).
        """
        elbo, codes, commitment = self._elbo(x, freeze=None)
        loss = commitment - elbo.reconstruction.sum() / max(x.shape[0], 1)
        extra = {
            "commitment": commitment.detach(),
            "perplexity": self._perplexity(codes),
            **self.likelihood_family.scalars(),
        }
        return Objective(loss, Elbo(*(part.detach() for part in elbo)), extra)

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
        """The codes: (B, *data) -> int64 (B, *code_shape)."""
        return self.posterior(x).mode

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's mean, (*batch, *data), for codes (*batch, *code_shape) or vectors (*batch, D, *grid)."""
        if not z.is_floating_point():
            return self.likelihood(z).mean
        dim = self._codes.dim or (z.shape[-len(self.grid) - 1] if z.ndim > len(self.grid) else 0)
        shape = (dim, *self.grid)
        batch = self._batch_of(z, shape)
        return self._likelihood(z.reshape(math.prod(batch), *shape), batch).mean

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)): (B, *data)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def sample(self, num_samples: int = 1, *, mean: bool = False, seed: int | None = None) -> Tensor:
        """Draws from p(x): z from the prior, then x from the likelihood; (num_samples, *data).

        mean: give the likelihood's mean of each z, which looks smoother and is no sample of x.
        seed: makes the draw repeatable on one device, and leaves torch's generators as they were.
        """
        prior, device = self.prior, self._device()
        with torch.random.fork_rng([device] if device.type != "cpu" else [], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            likelihood = self.likelihood(prior.sample(torch.Size((num_samples,))))
            return likelihood.mean if mean else likelihood.sample()

    # ------------------------------------------------------------------------------------------------------------

    def _elbo(self, x: Tensor, freeze: bool | None) -> tuple[Elbo, Tensor, Tensor]:
        """The bound, the codes (B, *code_shape), and the commitment, a scalar in nats per example."""
        vectors, codes, commitment = self._quantize(x, freeze)
        likelihood = self._likelihood(vectors, vectors.shape[:1])
        if x.shape[1:] != likelihood.event_shape:
            raise ValueError(
                f"VQVAE: the decoder describes x of shape {tuple(likelihood.event_shape)}, but x is {tuple(x.shape)}"
            )
        reconstruction = likelihood.log_prob(x)
        kl = -self.prior.log_prob(codes).to(reconstruction.dtype)
        return Elbo(reconstruction - kl, reconstruction, kl), codes, commitment

    def _encoded(self, x: Tensor) -> Tensor:
        """The encoder's vectors (B, D, *grid), checked."""
        if not torch.compiler.is_compiling() and x.is_floating_point() and not bool(x.sum().isfinite()):
            bad = x.isnan().flatten(1).any(1)
            if bool(bad.any()):
                raise ValueError(f"VQVAE: example {int(bad.nonzero()[0])} of x holds NaN")
        vectors = self.encoder(self.likelihood_family.features(x))
        grid = self._grid if self._grid is not None else tuple(vectors.shape[2:])
        dim = self._codes.dim or vectors.shape[1]
        if vectors.shape != (x.shape[0], dim, *grid):
            raise ValueError(
                f"VQVAE: the encoder returned {tuple(vectors.shape)} for x {tuple(x.shape)}, "
                f"expected {(x.shape[0], dim, *grid)}: (B, the quantizer's dim, *grid)"
            )
        self._grid = grid
        return vectors

    def _quantize(self, x: Tensor, freeze: bool | None) -> Quantized:
        return self._codes(self._encoded(x), freeze)

    def _vectors(self, codes: Tensor) -> Tensor:
        """(N, *code_shape) -> (N, D, *grid)."""
        return self._codes.vectors(codes, self.grid)

    def _perplexity(self, codes: Tensor) -> Tensor:
        stages = codes.flatten(1 + len(self.grid)).movedim(-1, 0) if self._codes.stages else codes[None]
        return torch.stack([perplexity(stage.flatten(), self._codes.num_codes) for stage in stages]).mean()

    def _device(self) -> torch.device:
        state = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if state is None else state.device

    def _likelihood(self, vectors: Tensor, batch: Sequence[int]) -> Factorized:
        parameters = self.decoder(vectors)
        per_channel = self.likelihood_family.channels
        if parameters.ndim < 2 or parameters.shape[0] != vectors.shape[0] or parameters.shape[1] % per_channel:
            raise ValueError(
                f"VQVAE: the decoder returned {tuple(parameters.shape)} for {vectors.shape[0]} z, expected "
                f"({vectors.shape[0]}, {per_channel} * channels, ...): {self.likelihood_family.name} takes "
                f"{per_channel} parameters per channel of x"
            )
        parameters = parameters.reshape(*batch, *parameters.shape[1:])
        return self.likelihood_family(parameters, parameters.ndim - len(batch))

    def _batch_of(self, z: Tensor, event: tuple[int, ...]) -> torch.Size:
        cut = z.ndim - len(event)
        if cut < 0 or z.shape[cut:] != event:
            raise ValueError(f"VQVAE: z is {tuple(z.shape)}, expected (..., {', '.join(map(str, event))})")
        return z.shape[:cut]
