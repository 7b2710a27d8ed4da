"""What `estimate` found out about log p(x), and how far it may be believed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from ferrovae.evidence import _rust
from ferrovae.evidence.bits import bits_per_dim


@dataclass(frozen=True)
class Evidence:
    """Per image, float64 [N] on the CPU unless noted; nats, summed over dimensions.

    log_px: estimate of log p(x), in expectation a lower bound of it.
    elbo: mean log weight over the same draws; `reconstruction - kl`, and its own standard error.
    reconstruction, kl: means over the draws of log p(x|z) and of log q(z|x) - log p(z).
    standard_error: Monte Carlo standard error of log_px; NaN where withheld because k-hat is too large or unknown.
    ess: effective sample size of the weights, between 1 and `samples`.
    khat: Pareto shape of the largest weights; 0 where they are constant, NaN where it cannot be fitted.
    reliable: bool; log_px and its standard error may be believed.
    exact: bool; the weights are constant, so q(z|x) is p(z|x) as far as the samples tell and log_px has no error.
    point_mass: bool; q(z|x) has a single latent: log_px is the bound log p(x|z) + log p(z), of one draw.
    index: int64; number of the image: its position in the tensor, or its index in the loader's dataset.
    samples: draws per image. dims: dimensions of an image.
    """

    log_px: torch.Tensor
    elbo: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor
    standard_error: torch.Tensor
    elbo_standard_error: torch.Tensor
    ess: torch.Tensor
    khat: torch.Tensor
    reliable: torch.Tensor
    exact: torch.Tensor
    point_mass: torch.Tensor
    index: torch.Tensor
    samples: int
    dims: int

    def __len__(self) -> int:
        return len(self.log_px)

    @property
    def direction(self) -> str:
        """`"exact"` when that holds for every image, else `"lower bound"`."""
        return "exact" if len(self) and bool(self.exact.all()) else "lower bound"

    @property
    def good_khat(self) -> float:
        """The largest k-hat at which `samples` weights are trusted: `min(1 - 1/log10 K, 0.7)`."""
        return _rust.good_khat(self.samples)

    def bits_per_dim(self, *, level_width: float = 1.0) -> torch.Tensor:
        """`ferrovae.evidence.bits_per_dim` of log_px, float64 [N]."""
        return bits_per_dim(self.log_px, self.dims, level_width=level_width)

    def samples_needed(self) -> torch.Tensor:
        """About how many samples each image needs, `10^(1 / (1 - k))` with k = max(0, k-hat); inf for k-hat >= 1."""
        k = self.khat.clamp(min=0.0)
        return torch.where(k < 1.0, 10.0 ** (1.0 / (1.0 - k.clamp(max=0.999999))), torch.inf + k)

    def mean_standard_error(self) -> float:
        """Monte Carlo standard error of the mean of log_px; NaN (withheld) when it is for any image."""
        return float(self.standard_error.square().sum().sqrt() / len(self)) if len(self) else math.nan

    def table(self, images: int = 5) -> str:
        """The means with both kinds of standard error, the k-hat bins, in words what to trust, and the `images` images
        with the largest k-hat."""
        from ferrovae.evidence.table import render

        return render(self, images)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: per-image lists, their means, and the scalars; null stands for withheld, unknown or infinite."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _SCALARS}
        lists = {name: _plain(tensor) for name, tensor in tensors.items()}
        averaged = ("log_px", "elbo", "reconstruction", "kl", "ess")
        mean = {name: _mean(tensors[name]) for name in averaged} | {"bits_per_dim": _mean(self.bits_per_dim())}
        over_images = {name: _over_images(tensors[name]) for name in ("log_px", "elbo", "reconstruction", "kl")}
        return {
            "samples": self.samples,
            "images": len(self),
            "dims": self.dims,
            "direction": self.direction,
            "good_khat": _finite(self.good_khat),
            "mean": mean,
            "standard_error_over_images": over_images,
            "monte_carlo_standard_error": _finite(self.mean_standard_error()),
            "reliable_images": int(self.reliable.sum()),
            **lists,
        }


_SCALARS = ("samples", "dims")


def standard_error_over_images(values: torch.Tensor) -> float:
    """How far the mean over these images may be from that over all images like them; NaN for fewer than two."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _over_images(values: torch.Tensor) -> float | None:
    return _finite(standard_error_over_images(values))


def _mean(values: torch.Tensor) -> float | None:
    return _finite(float(values.mean())) if len(values) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(values: torch.Tensor) -> list[Any]:
    plain = values.tolist()
    return [_finite(value) for value in plain] if values.is_floating_point() else plain
