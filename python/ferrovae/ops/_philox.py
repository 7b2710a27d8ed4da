"""Counter-based random numbers in plain torch: Philox4x32-10 and our Box-Muller, as in Rust and Triton.

A word is a 32-bit number; torch has no unsigned arithmetic, so words are int64 tensors in [0, 2^32). The normals use
float32 sums and products in this order and nothing else, so that without fused multiply-adds they are equal in every
bit. Philox: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# ln m = f - f^2/2 + f^3 P(f) with f = m - 1, sqrt(1/2) <= m < sqrt(2); sine and cosine up to pi/4 (Cephes, Moshier).
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_LN2 = (0.693359375, -2.12194440e-4)
_SQRT_HALF_BITS = 0x3F3504F3


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter (c0, c1, c2, c3) under the key `seed` int64 [1]; counters broadcast."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps: all 64 bits of the product
        c0, c1, c2, c3 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD, (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def normals(seed: Tensor, example_ids: Tensor, samples: Tensor, columns: int) -> Tensor:
    """float32 standard normals [S, N, columns] of example_ids int64 [N] and sample numbers int64 [S]."""
    groups = torch.arange((columns + 3) // 4, device=seed.device)
    ids = example_ids.view(1, -1, 1)
    words = philox(seed, groups, samples.view(-1, 1, 1), ids & _WORD, (ids >> 32) & _WORD)
    pairs = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.stack(pairs, dim=-1).flatten(2)[..., :columns]


def gumbels(seed: Tensor, row_ids: Tensor, head: int, columns: int) -> Tensor:
    """float32 Gumbel numbers [N, columns]: word column % 4 of counter (column // 4, head, row id low, row id high)."""
    groups = torch.arange((columns + 3) // 4, device=seed.device)
    ids = row_ids.view(-1, 1)
    words = philox(seed, groups, torch.full_like(seed, head), ids & _WORD, (ids >> 32) & _WORD)
    return _gumbel(torch.stack(words, dim=-1).flatten(1)[:, :columns])


def _gumbel(word: Tensor) -> Tensor:
    """-ln(-ln u), u = (word + 1/2) / 2^32; above 1/2 of 1 - u, so that both tails keep all digits: -3.13 to 22.88."""
    upper = word >= 2**31
    small = torch.where(upper, _WORD - word, word).to(torch.float32) * 2.0**-32 + 2.0**-33
    rest = 1.0 - small
    lost = (1.0 - rest) - small  # 1 - small = rest + lost
    return -_log(-(_log(torch.where(upper, rest, small)) + torch.where(upper, lost / rest, 0.0)))


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals, radius times (cosine, sine): 32 bits of radius (up to 6.76), 24 bits of angle."""
    uniform = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = torch.sqrt((_log(uniform) * -2.0).double()).float()  # in float32, torch's root may be off by a bit
    turns = angle_word >> 8
    quarter = (turns + 2**21) >> 22  # 0..4: the nearest multiple of a quarter turn
    angle = (turns - (quarter << 22)).to(torch.float32) * (2 * math.pi * 2.0**-24)
    square = angle * angle
    sine = ((_SINE[0] * square + _SINE[1]) * square + _SINE[2]) * square * angle + angle
    cosine = ((_COSINE[0] * square + _COSINE[1]) * square + _COSINE[2]) * square * square - square * 0.5 + 1.0
    swap = (quarter & 1) == 1
    first, second = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    first = torch.where(((quarter + 1) & 2) != 0, -first, first)
    second = torch.where((quarter & 2) != 0, -second, second)
    return radius * first, radius * second


def _log(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    square = f * f
    series = torch.full_like(f, _LOG[0])
    for coefficient in _LOG[1:]:
        series = series * f + coefficient
    power = exponent.to(torch.float32)
    return series * f * square + power * _LN2[1] - square * 0.5 + f + power * _LN2[0]
