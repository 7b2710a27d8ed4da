"""A codebook for every row, made from the layer's by a function: implicit neural codebooks.

The only place where N x K x D numbers are computed, and they are so for a few rows at a time: each part is computed
again in the backward pass, where the function can be asked for a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

_NUMBERS = 1 << 22  # of one part: 16 MiB, so that the function may hold four of them


@runtime_checkable
class RowwiseTransform(Protocol):
    """A `codebook_transform_fn` that can be asked for the codebooks of some rows."""

    def rows(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """codes (H, K, D) -> the codebooks of rows start to stop, (H, stop - start, K, D)."""
        ...


class ConditionedTransform:
    """The codebooks of rows under a condition (B, N, D), by `function(codes, condition=...)`, in parts.

    function: (H, K, D) and a condition (1, n, D) -> (H, 1, n, K, D), each row by its own condition alone.
    """

    def __init__(self, function: Callable[..., Tensor], condition: Tensor) -> None:
        self.function = function
        self.condition = condition

    def __call__(self, codes: Tensor) -> Tensor:
        """All of them: (H, B, N, K, D)."""
        return self.function(codes, condition=self.condition)

    def rows(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """Those of rows start to stop of the B N: (H, stop - start, K, D)."""
        condition = self.condition.reshape(-1, self.condition.shape[-1])[start:stop]
        return self.function(codes, condition=condition[None]).squeeze(1)


class TokenCodebooks:
    """The codebooks of the N rows of a call: their nearest codes and the losses over their softmax.

    H codebooks, N rows, K codes, D dimensions.

    Args:
        transform: (H, K, D) -> (H, B, N, K, D), or (H, N, K, D); a `RowwiseTransform` is asked part by part.
        codes: (H, K, D), what it starts from.
        cosine: codes are brought to length 1 and compared by inner products.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor], codes: Tensor, cosine: bool) -> None:
        self._cosine = cosine
        self._codes = codes
        self._rowwise = transform if isinstance(transform, RowwiseTransform) else None
        self._whole: Tensor | None = None
        if self._rowwise is None:
            made = transform(codes)
            self._whole = made.reshape(made.shape[0], -1, *made.shape[-2:])

    def look_up(
        self, x: Tensor, *, topk: int | None = None, temperature: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Indices (H, N) and their codes (H, N, D), with an axis k before D for topk; x: (H, N, D).

        temperature: draw from softmax(-distance / temperature) instead of taking the nearest.
        """

        def part(rows: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
            codes = self._part(start, stop)
            scores = self._scores(rows, codes)
            if temperature is not None:
                scores = scores / temperature - torch.rand_like(scores).clamp(min=1e-20).log().neg().log()
            indices = scores.topk(1 if topk is None else topk, dim=-1).indices
            chosen = codes.gather(2, indices[..., None].expand(*indices.shape, codes.shape[-1]))
            return indices, chosen

        parts = list(self._each(x, part))
        indices, chosen = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        return (indices.squeeze(2), chosen.squeeze(2)) if topk is None else (indices, chosen)

    def soft_gradient(self, x: Tensor, temperature: float | Tensor) -> Tensor:
        """Zeros (H, N, D) with the gradient of the expected code through its softmax; x: (H, N, D)."""

        def part(rows: Tensor, start: int, stop: int) -> Tensor:
            codes = self._part(start, stop)
            weights = (self._scores(rows, codes) / temperature).softmax(dim=-1)
            expected = torch.einsum("hnk,hnkd->hnd", weights, codes.detach())
            return expected - expected.detach()

        return torch.cat(list(self._each(x, part)), dim=1)

    def cross_entropy(self, x: Tensor, indices: Tensor) -> Tensor:
        """As `losses.cross_entropy`."""

        def part(rows: Tensor, start: int, stop: int) -> Tensor:
            scores = self._scores(rows, self._part(start, stop))
            return torch_cross_entropy(
                scores.flatten(0, 1), indices[:, start:stop].flatten(), ignore_index=-1, reduction="sum"
            )

        return torch.stack(list(self._each(x, part))).sum() / (indices >= 0).sum().clamp(min=1)

    def negative_diversity(self, x: Tensor, mask: Tensor | None, positions: int, temperature: float) -> Tensor:
        """As `losses.negative_diversity`; holds `positions` times K numbers."""
        seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        position = torch.arange(x.shape[1], device=x.device) % positions
        totals = [x.new_zeros(positions, self._codes.shape[1]) for _ in range(x.shape[0])]

        def part(rows: Tensor, start: int, stop: int) -> Tensor:
            scores = self._scores(rows, self._part(start, stop))
            return torch.where(seen[:, start:stop, None], (scores * temperature).softmax(dim=-1), 0.0)

        for number, probabilities in enumerate(self._each(x, part)):
            start = number * self._step(x)
            for head in range(x.shape[0]):
                place = position[start : start + probabilities.shape[1]]
                totals[head] = totals[head].index_add(0, place, probabilities[head])
        counts = torch.stack([x.new_zeros(positions).index_add(0, position, row.to(x.dtype)) for row in seen])
        means = torch.stack(totals) / counts.clamp(min=1)[..., None]
        return -torch.special.entr(means).sum() / (counts > 0).sum().clamp(min=1)

    def _step(self, x: Tensor) -> int:
        return max(1, _NUMBERS // self._codes.numel())

    def _each(self, x: Tensor, function: Callable[[Tensor, int, int], Any]) -> Iterator[Any]:
        """The function of each part of the rows, not remembering what can be computed again."""
        step = self._step(x)
        for start in range(0, max(x.shape[1], 1), step):
            stop = min(start + step, x.shape[1])
            rows = x[:, start:stop]
            if torch.is_grad_enabled():
                yield checkpoint(function, rows, start, stop, use_reentrant=False)
            else:
                yield function(rows, start, stop)

    def _part(self, start: int, stop: int) -> Tensor:
        """The codebooks of some rows, (H, n, K, D) in the dtype of the codes."""
        if self._rowwise is not None:
            made = self._rowwise.rows(self._codes, start, stop)
        else:
            assert self._whole is not None
            made = self._whole[:, start:stop]
        return normalize(made, dim=-1, eps=1e-6) if self._cosine else made

    def _scores(self, x: Tensor, codes: Tensor) -> Tensor:
        """Larger is nearer: (H, n, D), (H, n, K, D) -> (H, n, K)."""
        if self._cosine:
            return torch.einsum("hnd,hnkd->hnk", x.to(codes.dtype), codes)
        return -vector_norm(x.to(codes.dtype)[:, :, None] - codes, dim=-1)
