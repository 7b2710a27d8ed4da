"""How a VQ-VAE uses its codebook on a set of images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CodeUsage:
    """How often each code is chosen: stage_counts [Q, K], a row for each stage of a residual quantizer, else one."""

    stage_counts: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Over all stages: [K]."""
        return self.stage_counts.sum(0)

    @property
    def active(self) -> int:
        """Codes used at least once, by any stage."""
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """exp of the usage's entropy: as many codes, used alike, would have it. The mean over stages."""
        share = self.stage_counts.double() / self.stage_counts.sum(1, keepdim=True).clamp_min(1)
        return float(torch.special.entr(share).sum(1).exp().mean())


def code_usage(model: Any, batches: Iterable[torch.Tensor]) -> CodeUsage:
    """Count the codes of all images; the codebook is not touched."""
    size, places = int(model.quantizer.codebook_size), len(model.grid)
    stage_counts = torch.zeros(1, size, dtype=torch.int64)
    with torch.inference_mode():
        for x in batches:
            codes = model.encode(x).cpu()
            stages = codes.flatten(1 + places).movedim(-1, 0) if codes.ndim > 1 + places else codes[None]
            stage_counts = stage_counts + torch.stack([stage.flatten().bincount(minlength=size) for stage in stages])
    return CodeUsage(stage_counts)
