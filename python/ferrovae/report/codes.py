"""How a VQ-VAE uses its codebook on a set of images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CodeUsage:
    """How often each code is the nearest one: counts [K]."""

    counts: torch.Tensor

    @property
    def active(self) -> int:
        """Codes used at least once."""
        return int((self.counts > 0).sum())

    @property
    def entropy(self) -> float:
        """Entropy of the usage in nats; log K when every code is used alike."""
        share = self.counts.double() / max(int(self.counts.sum()), 1)
        return float(-(share * share.clamp_min(1e-300).log()).sum())

    @property
    def perplexity(self) -> float:
        """exp(entropy): as many codes as this, used alike, would have the same entropy."""
        return math.exp(self.entropy)


def code_usage(model: Any, batches: Iterable[torch.Tensor]) -> CodeUsage:
    """Count the codes of all images; the codebook is not touched."""
    size = int(model.quantizer.codebook_size)
    counts = torch.zeros(size, dtype=torch.int64)
    with torch.inference_mode():
        for x in batches:
            counts += torch.bincount(model.encode(x).flatten().cpu(), minlength=size)
    return CodeUsage(counts)
