"""How many rows each code attracted and their sum, over the rows of every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """Asked at every call: a process group may be made after the layer."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all ranks of float32 tensors, by one all-reduce; the tensors themselves where there is one rank."""
    if rank_and_world_size()[1] == 1:
        return list(tensors)
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(packed)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def code_statistics(x: Tensor, indices: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Counts (K,) and sums (K, D), float32, of this rank's valid rows by code; no N x K.

    x: (N, D) float32; indices: (N,) int64; valid: (N,) bool. An invalid row adds nothing, whatever it holds.
    """
    counts = torch.zeros(size, dtype=torch.int64, device=x.device).index_add_(0, indices, valid.to(torch.int64))
    rows = torch.where(valid[:, None], x, 0.0)
    sums = torch.zeros(size, x.shape[1], device=x.device).index_add_(0, indices, rows)
    return counts.to(torch.float32), sums


def perplexity(indices: Tensor, size: int) -> Tensor:
    """exp of the entropy of the codes' frequencies: float32 [], from 1 (one code, or no indices) to K (all alike).

    indices: (N,) int64 in [0, K).
    """
    counts = torch.zeros(size, dtype=torch.int64, device=indices.device)
    counts.index_add_(0, indices, torch.ones_like(indices))
    frequencies = counts / counts.sum().clamp(min=1)
    return torch.special.entr(frequencies).sum().exp()
