"""Random choices as pure functions of a key and a counter: the same on every rank and after a resume."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(word: Tensor) -> Tensor:
    """The 32-bit finaliser `lowbias32` (Wellons, 2018), on int64 values in [0, 2^32)."""
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _WORD
    return word ^ (word >> 16)


def keyed_words(key: Tensor, counters: Tensor, stream: int) -> Tensor:
    """One pseudo-random int64 in [0, 2^32) for each counter; distinct streams of one key are unrelated."""
    return _mix(_mix(counters & _WORD) ^ _mix((key + stream * 0x9E3779B9) & _WORD))


def key_of(state: Tensor) -> Tensor:
    """A key, int64 [], from the bits of a float32 tensor; of checkpointed state, so that a resumed run finds it."""
    words = state.detach().reshape(-1).view(torch.int32).to(torch.int64) & _WORD
    counters = torch.arange(words.numel(), device=words.device)
    return _mix((_mix(words) * (2 * counters + 1)).sum() & _WORD)


def head_keys(key: Tensor, heads: int) -> Tensor:
    """A key for each of H codebooks, (H,) int64; one codebook keeps the key itself."""
    if heads == 1:
        return key[None]
    return keyed_words(key, torch.arange(heads, device=key.device), 2)


def stratified_rows(
    valid: Tensor, slots: int, key: Tensor, *, offset: Tensor | int, total: Tensor | int, distinct: bool
) -> tuple[Tensor, Tensor]:
    """Choose a row of the union of all ranks' valid rows for each slot, spread evenly over the union.

    The union is cut into `slots` strata, dealt to the slots in random order; each slot takes a random row of its
    stratum. So the rows are distinct where there are enough, at a cost of O(N + slots log slots) and no host sync.

    Args:
        valid: (N,) bool, N >= 1: which of this rank's rows may be chosen.
        slots: how many rows to choose.
        key: int64 []; the choice is a function of it, `slots` and the place of a row in the union.
        offset, total: how many valid rows the ranks before this one hold, and all ranks together.
        distinct: with fewer rows than slots, leave slots empty rather than give a row twice.

    Returns:
        rows (slots,) int64 into this rank's rows, and filled (slots,) bool: the slot's row is on this rank.
    """
    counters = torch.arange(slots, device=valid.device)
    strata = torch.argsort(keyed_words(key, counters, 0), stable=True)
    low, high = strata * total // slots, (strata + 1) * total // slots
    width = high - low
    place = low + keyed_words(key, strata, 1) % width.clamp(min=1) - offset
    ranks_valid = torch.cumsum(valid, 0)
    filled = (place >= 0) & (place < ranks_valid[-1])
    if distinct:
        filled &= width > 0
    rows = torch.searchsorted(ranks_valid, place + 1).clamp(max=valid.shape[0] - 1)
    return rows, filled
