"""How a codebook is used: the health report of a quantizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ferrovae.nn.quantizers.rank_sum import all_reduce_packed


class CodebookUsage(NamedTuple):
    """Of K codes, with a leading axis of heads where each has a codebook of its own."""

    active: Tensor  # int64 []: codes that are not dead
    perplexity: Tensor  # float32 []: exp(entropy), from 1 (one code) to K (all alike)
    entropy: Tensor  # float32 []: of the codes' frequencies, in nats
    dead: Tensor  # bool [K]
    age: Tensor  # int64 [K]: training steps since a row last went to the code


def usage_of_counts(counts: Tensor, age: Tensor, threshold: float) -> CodebookUsage:
    """counts: (H, K) float32, of any scale; a code is dead if its count is under the threshold. age: (H, K)."""
    frequencies = counts / counts.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
    entropy = torch.special.entr(frequencies).sum(dim=-1)
    dead = counts < threshold
    report = ((~dead).sum(dim=-1), entropy.exp(), entropy, dead, age.to(torch.int64))
    return CodebookUsage(*(tensor.squeeze(0) if counts.shape[0] == 1 else tensor for tensor in report))


def counts_of_indices(indices: Tensor, size: int, *, synchronized: bool) -> Tensor:
    """How often each code occurs, over all ranks: (H, N) int64, -1 for none -> (H, K) float32."""
    heads = indices.shape[0]
    first = size * torch.arange(heads, device=indices.device)[:, None]
    flat = (indices + first)[indices >= 0]
    counts = torch.bincount(flat, minlength=heads * size).view(heads, size).to(torch.float32)
    return all_reduce_packed([counts])[0] if synchronized else counts
