"""Gaussian likelihood with a fixed, learned, per-dimension or optimal standard deviation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ferrovae.likelihoods.base import Factorized, Likelihood, wide
from ferrovae.ops import gaussian_log_prob

__all__ = ["Gaussian", "GaussianDistribution"]

LOG_SIGMA_FLOOR = -7.0


class GaussianDistribution(Factorized):
    """p(x|z) = N(x; mean, sigma^2), independent dimensions.

    Args:
        mean: (*batch, *event), float32 or float64.
        log_sigma: of the same shape, or a scalar tensor; nothing below -7 is taken at its word.
        event_dims: trailing dimensions of one x.
        running: of the optimal likelihood while it trains: `log_prob(x)` uses the sigma that suits x best and
            folds it into this module's running value.
    """

    has_rsample = True

    def __init__(
        self,
        mean: Tensor,
        log_sigma: Tensor,
        event_dims: int,
        *,
        running: Gaussian | None = None,
        validate_args: bool = True,
    ) -> None:
        cut = mean.ndim - event_dims
        log_sigma = log_sigma.clamp_min(LOG_SIGMA_FLOOR)
        self._running = running
        super().__init__("gaussian", mean.shape[:cut], mean.shape[cut:], (mean, log_sigma), validate_args)

    @property
    def mean(self) -> Tensor:
        return self.parameters[0]

    @property
    def log_sigma(self) -> Tensor:
        return self.parameters[1]

    @property
    def stddev(self) -> Tensor:
        """sigma: (*batch, *event)."""
        return self.log_sigma.exp().to(self.mean.dtype).expand_as(self.mean)

    @property
    def variance(self) -> Tensor:
        return self.stddev.square()

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """x, differentiable in mean and sigma: (*sample_shape, *batch, *event)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.stddev * noise

    def _total(self, x: Tensor) -> Tensor:
        log_sigma = self.log_sigma
        if self._running is not None:
            log_sigma = self._running.fit((wide(x) - wide(self.mean)).detach().square())
        x, batch = self._matched(x)
        return gaussian_log_prob(x, self.mean.expand(batch + self.event_shape), log_sigma, batch_dims=len(batch))


class Gaussian(Likelihood):
    """N(x; mean, sigma^2) with the decoder's output as mean.

    Args:
        sigma: a number (fixed); `"learned"` (one learned scalar); `"per_dimension"` (the decoder also gives
            log sigma: `channels` is 2); `"optimal"` (the sigma that maximises the likelihood of the batch, in
            closed form; sigma-VAE, Rybkin, Daniilidis and Levine 2021), of which `eval` mode uses a running mean.
        momentum: of that running mean of sigma^2.

    log sigma is floored at -7. A sigma that is not fixed has unbounded density on data that sit on a grid, such as
    undequantised pixels: its log p(x) is then no measure of quality.

    Raises:
        ValueError: sigma is not positive, or not one of the names.
    """

    name = "gaussian"
    running_variance: Tensor
    batches: Tensor

    def __init__(
        self, sigma: float | Literal["learned", "per_dimension", "optimal"] = 1.0, *, momentum: float = 0.01
    ) -> None:
        super().__init__()
        if isinstance(sigma, str):
            if sigma not in ("learned", "per_dimension", "optimal"):
                raise ValueError(
                    f"Gaussian: sigma is {sigma!r}, expected a positive number, 'learned', 'per_dimension' or 'optimal'"
                )
        elif not (math.isfinite(sigma) and math.log(max(sigma, 1e-300)) >= LOG_SIGMA_FLOOR):
            raise ValueError(f"Gaussian: sigma is {sigma}, expected a finite number of at least exp(-7) = 0.00091")
        self.sigma, self.momentum = sigma, momentum
        self.channels = 2 if sigma == "per_dimension" else 1
        if sigma == "learned":
            self.log_sigma = nn.Parameter(torch.zeros(()))
        elif sigma == "optimal":
            self.register_buffer("running_variance", torch.ones(()))
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"sigma={self.sigma!r}"

    def forward(self, parameters: Tensor, event_dims: int) -> GaussianDistribution:
        split = self.split(parameters, event_dims)
        mean = split.select(-event_dims - 1, 0)
        running = None
        if self.sigma == "per_dimension":
            log_sigma = split.select(-event_dims - 1, 1)
        elif self.sigma == "learned":
            log_sigma = wide(self.log_sigma)
        elif self.sigma == "optimal":
            log_sigma = 0.5 * wide(self.running_variance).log()
            running = self if self.training else None
        else:
            log_sigma = wide(mean.new_full((), 0.0)) + math.log(self.sigma)
        return GaussianDistribution(mean, log_sigma, event_dims, running=running, validate_args=self.validate_args)

    @torch.no_grad()
    def fit(self, squares: Tensor) -> Tensor:
        """log of the sigma that maximises the likelihood of these squared residuals, folded into the running value.

        No gradient: at the optimum the likelihood does not change with sigma to first order. A mean that is not
        finite leaves the running value alone; the first batches count alike, until `momentum` exceeds 1/n.
        """
        best = squares.mean()
        usable = best.isfinite()
        self.batches += usable
        rate = (1 / self.batches.clamp_min(1)).clamp_min(self.momentum).to(best.dtype)
        old = self.running_variance.to(best.dtype)
        self.running_variance.copy_(torch.where(usable, old + rate * (best - old), old))
        return (0.5 * best.log()).clamp_min(LOG_SIGMA_FLOOR)

    def scalars(self) -> dict[str, Tensor]:
        if self.sigma == "learned":
            return {"sigma": self.log_sigma.detach().clamp_min(LOG_SIGMA_FLOOR).exp()}
        return {"sigma": self.running_variance.sqrt()} if self.sigma == "optimal" else {}
