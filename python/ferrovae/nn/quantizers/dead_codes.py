"""Dead codes: those that hardly any row goes to become rows of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ferrovae.nn.quantizers.keyed_sampling import head_keys, key_of, stratified_rows
from ferrovae.nn.quantizers.rank_sum import rank_and_world_size


def replacement_rows(x: Tensor, valid: Tensor, state: Tensor, *, synchronized: bool) -> tuple[Tensor, Tensor]:
    """A batch row for every code, dead or not, so that shapes are fixed and nothing waits for the device.

    The ranks are taken to hold equally many rows; where they do not, a slot at a border may get none or two, and its
    code waits for the next step.

    x: (H, N, D) float32; valid: (H, N) bool; state: (H, K) float32, whose bits are the key of the choice.
    Returns rows (H, K, D), 0 where this rank has none for the code, and filled (H, K): 1.0 where it has.
    """
    heads, size = state.shape
    if x.shape[1] == 0:
        return x.new_zeros(heads, size, x.shape[2]), x.new_zeros(heads, size)
    rank, world_size = rank_and_world_size() if synchronized else (0, 1)
    keys = head_keys(key_of(state), heads)
    rows, filled = [], []
    for head in range(heads):
        held = valid[head].sum()
        chosen, has_row = stratified_rows(
            valid[head], size, keys[head], offset=rank * held, total=world_size * held, distinct=True
        )
        rows.append(torch.where(has_row[:, None], x[head][chosen], 0.0))
        filled.append(has_row.to(x.dtype))
    return torch.stack(rows), torch.stack(filled)


def dead(counts: Tensor, filled: Tensor, threshold: Tensor | float) -> Tensor:
    """Which codes are to be replaced: (H, K) bool, the moving count under the threshold and exactly one row at hand."""
    return (counts < threshold) & (filled == 1)
