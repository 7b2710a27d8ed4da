"""Evaluate a run: log p(x) of its test images, active units or code usage, and `evaluation.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ferrovae.evidence import ActiveUnits, Evidence, active_units, estimate
from ferrovae.models import VQVAE
from ferrovae.report.codes import CodeUsage, code_usage
from ferrovae.report.subject import Subject
from ferrovae.training.checkpoint import replace_file

TITLES = {"vae": "VAE", "vqvae": "VQ-VAE"}
# A latent dimension whose posterior mean varies less than this repeats the prior (Burda et al. 2016).
ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True)
class Evaluation:
    """What was found of a run.

    `evidence` has the per-image results in nats; `squared_error` is the mean per pixel, on the scale of the data;
    `units` (a VAE's) are the latent dimensions that follow the image, `usage` (a VQ-VAE's) counts the codes.
    """

    subject: Subject
    evidence: Evidence
    squared_error: float
    units: ActiveUnits | None
    usage: CodeUsage | None

    @property
    def title(self) -> str:
        """`VAE on digits`."""
        return f"{TITLES[self.subject.config.kind]} on {self.subject.dataset.name}"

    def summary(self) -> str:
        """The result in one line."""
        elbo, bits = float(self.evidence.elbo.mean()), float(self.evidence.bits_per_dim().mean())
        if self.usage is not None:
            return (
                f"ELBO {elbo:.2f} nats, at most {bits:.3f} bits/dim; "
                f"code perplexity {self.usage.perplexity:.1f} of {len(self.usage.counts)}"
            )
        trusted = f"{int(self.evidence.reliable.sum())} of {len(self.evidence)} images"
        log_px = float(self.evidence.log_px.mean())
        return f"log p(x) {log_px:.2f} nats, {bits:.3f} bits/dim, ELBO {elbo:.2f}; reliable for {trusted}"

    def table(self) -> str:
        """The evidence table, then what else was measured, for a terminal."""
        lines = [self.evidence.table(), "", f"squared error per pixel   {self.squared_error:.5f}"]
        if self.units is not None:
            lines.append(f"active units              {self.units.count} of {self.units.variance.numel()}")
        if self.usage is not None:
            codes = len(self.usage.counts)
            lines.append(f"code perplexity           {self.usage.perplexity:.1f} of {codes}")
            lines.append(f"codes in use              {self.usage.active} of {codes}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The content of `evaluation.json`: means and per-image lists under the names of `estimate`'s result."""
        dataset = self.subject.dataset
        result: dict[str, Any] = {
            "model": self.subject.config.kind,
            "data": {"name": dataset.name, "split": "test", "images": len(dataset), "fingerprint": dataset.fingerprint},
            **self.evidence.to_dict(),
            "squared_error": self.squared_error,
        }
        if self.units is not None:
            result |= {"active_units": self.units.count, "unit_variances": self.units.variance.tolist()}
        if self.usage is not None:
            result |= {
                "perplexity": self.usage.perplexity,
                "active_codes": self.usage.active,
                "code_counts": self.usage.counts.tolist(),
            }
        return result


def evaluate(
    run_dir: str | os.PathLike[str],
    *,
    samples: int = 5000,
    images: int | None = 500,
    seed: int = 0,
    memory_budget: int = 256 * 2**20,
    data: str | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int | None], None] | None = None,
) -> Evaluation:
    """Estimate log p(x) of a run's test images and write `evaluation.json` into the run.

    Args:
        run_dir: a run of `ferrovae train`.
        samples: importance samples per image.
        images: how many test images, from the first on; None for all.
        seed: of the importance samples.
        memory_budget: bytes the estimator may hold at a time.
        data: where the data are, if they have moved since the training.
        device: where the model runs.
        progress: called with (done, total) units of work.

    Raises:
        ConfigurationError, CheckpointError, DataError: the run or the data is not what it should be.
        ValueError: an argument cannot be meant.
    """
    subject = Subject.open(run_dir, images=images, data=data, device=device)
    result = estimate(
        subject.model, subject.loader(), samples=samples, seed=seed, memory_budget=memory_budget, progress=progress
    )
    is_vq = isinstance(subject.model, VQVAE)
    evaluation = Evaluation(
        subject=subject,
        evidence=result,
        squared_error=_squared_error(subject),
        units=None if is_vq else active_units(subject.model, subject.loader(), ACTIVE_VARIANCE),
        usage=code_usage(subject.model, subject.batches()) if is_vq else None,
    )
    replace_file(subject.run_dir / "evaluation.json", json.dumps(evaluation.to_dict(), indent=1, allow_nan=False))
    return evaluation


@torch.inference_mode()
def _squared_error(subject: Subject) -> float:
    """Mean of (x - reconstruction)^2 over images and pixels."""
    total, count = 0.0, 0
    for x in subject.batches():
        error = (subject.model.reconstruct(x).double() - x.double()).square()
        total, count = total + float(error.sum()), count + error.numel()
    return total / max(count, 1)
