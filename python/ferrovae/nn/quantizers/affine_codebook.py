"""A codebook that the scale and place of the batch's distribution are factored out of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.codebook import Codebook, CodebookOptions
from ferrovae.nn.quantizers.rank_sum import all_reduce_packed

_SMALLEST = 1e-5


class AffineOptions:
    """How fast the moments of batch and codebook move, and whether the batch's are those of all ranks."""

    def __init__(self, batch_decay: float = 0.99, codebook_decay: float = 0.9, synchronized: bool = False) -> None:
        self.batch_decay = batch_decay
        self.codebook_decay = codebook_decay
        self.synchronized = synchronized


class AffineCodebook(Codebook):
    """Codes moved to where the data lie: code' = (code - codebook_mean) batch_std / codebook_std + batch_mean.

    The affine reparameterization of Huh et al. (2023, arXiv:2305.08842): the few moments follow the encoder at once,
    so that codes no row goes to are not left behind. The means and variances (H, 1, D) are moving averages of the
    batches and of `embed`, taken in training only, before the lookup; the first training batch sets them.
    """

    batch_mean: Tensor
    batch_variance: Tensor
    codebook_mean: Tensor
    codebook_variance: Tensor
    codebook_mean_needs_init: Tensor
    codebook_variance_needs_init: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        options: CodebookOptions | None = None,
        vq_bridge: nn.Module | None = None,
        *,
        affine: AffineOptions,
    ) -> None:
        super().__init__(dim, codebook_size, num_codebooks, options, vq_bridge)
        self.affine = affine
        shape = num_codebooks, 1, dim
        for name in ("batch", "codebook"):
            self.register_buffer(f"{name}_mean", torch.zeros(shape, dtype=torch.float32))
            self.register_buffer(f"{name}_variance", torch.ones(shape, dtype=torch.float32))
        self.register_buffer("codebook_mean_needs_init", torch.tensor(True))
        self.register_buffer("codebook_variance_needs_init", torch.tensor(True))

    @property
    def looks_up_embed(self) -> bool:
        return False

    def codes(self) -> Tensor:
        codes = super().codes()
        # A copy, because the moving averages and dead codes write into `embed` before the backward pass.
        codes = codes if self.vq_bridge is not None else codes.clone()
        moved = (codes - self.codebook_mean) * self._scale() + self.batch_mean
        # Another copy: the next observation, of a later stage or batch, may come before the backward pass too.
        return torch.where(self.codebook_mean_needs_init.clone(), codes, moved)

    @torch.no_grad()
    def observe(self, x: Tensor, valid: Callable[[], Tensor]) -> None:
        affine, fresh = self.affine, self.codebook_mean_needs_init.clone()
        mean, variance, rows = _moments(x, valid(), affine.synchronized and self.synchronized)
        seen = rows > 0
        for name, moments, decay in (
            ("codebook", (self.embed.mean(1, True), self.embed.var(1, unbiased=False, keepdim=True)), None),
            ("batch", (mean, variance), affine.batch_decay),
        ):
            for kind, new in zip(("mean", "variance"), moments, strict=True):
                old = getattr(self, f"{name}_{kind}")
                rate = 1 - (affine.codebook_decay if decay is None else decay)
                old.copy_(torch.where(seen, torch.where(fresh, new, old.lerp(new, rate)), old))
        started = seen.all()
        self.codebook_mean_needs_init.logical_and_(~started)
        self.codebook_variance_needs_init.logical_and_(~started)

    def _scale(self) -> Tensor:
        """batch_std / codebook_std, (H, 1, D)."""
        return (self.batch_variance.clamp(min=_SMALLEST) / self.codebook_variance.clamp(min=_SMALLEST)).sqrt()

    def _into_codebook_space(self, sums: Tensor, counts: Tensor) -> Tensor:
        moved = (sums - counts * self.batch_mean) / self._scale() + counts * self.codebook_mean
        return torch.where(self.codebook_mean_needs_init, sums, moved)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As upstream, which has no batch moments before the first step."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if bool(self.codebook_mean_needs_init):
            del destination[f"{prefix}batch_mean"], destination[f"{prefix}batch_variance"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("batch_mean", "batch_variance"):
            state_dict.setdefault(prefix + name, getattr(self, name).detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.codebook_mean_needs_init.is_meta and bool(self.codebook_mean_needs_init):
            # What a codebook that saw no step saves is memory that nobody wrote.
            for mean in (self.batch_mean, self.codebook_mean):
                mean.data.zero_()
            for variance in (self.batch_variance, self.codebook_variance):
                variance.data.fill_(1.0)


def _moments(x: Tensor, valid: Tensor, synchronized: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (H, 1, D) of the valid rows, and how many (H, 1, 1); one all-reduce, in float64."""
    visible = torch.where(valid[..., None], x, 0.0).to(torch.float64)
    parts = [valid.sum(1, dtype=torch.float64)[:, None, None], visible.sum(1, True), visible.square().sum(1, True)]
    rows, sums, squares = all_reduce_packed(parts) if synchronized else parts
    count = rows.clamp(min=1)
    mean = sums / count
    variance = (squares / count - mean.square()).clamp(min=0)
    return mean.to(torch.float32), variance.to(torch.float32), rows
