"""Standard normals and Gumbel numbers from Philox4x32-10: the same words as in Rust and torch, numbers within 1e-6.

Our own Box-Muller because `tl.randn` uses one word of four, and `tl.sin`, `tl.cos` and `tl.log` carry range reductions
and branches that arguments below a quarter turn, or between 2^-33 and 1, never need: half the instructions.
"""

import triton
import triton.language as tl

_TURN = tl.constexpr(3.7450702829239286e-07)  # 2 pi 2^-24
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit
def _log(x):
    """ln x for normal x > 0: x = 2^exponent (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), a polynomial in f (Cephes)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    series = f * 7.0376836292e-2 - 1.1514610310e-1
    series = series * f + 1.1676998740e-1
    series = series * f - 1.2420140846e-1
    series = series * f + 1.4249322787e-1
    series = series * f - 1.6668057665e-1
    series = series * f + 2.0000714765e-1
    series = series * f - 2.4999993993e-1
    series = series * f + 3.3333331174e-1
    power = exponent.to(tl.float32)
    return series * f * square + power * -2.12194440e-4 - square * 0.5 + f + power * 0.693359375


@triton.jit
def gumbel(word):
    """-ln(-ln u), u = (word + 1/2) / 2^32; above 1/2 of 1 - u, so that both tails keep all digits."""
    upper = word > 0x7FFFFFFF
    near = tl.where(upper, word ^ 0xFFFFFFFF, word).to(tl.int32)
    small = near.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    rest = 1.0 - small
    lost = (1.0 - rest) - small  # 1 - small = rest + lost
    return -_log(-(_log(tl.where(upper, rest, small)) + tl.where(upper, lost / rest, 0.0)))


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normals from two words: radius times cosine, radius times sine."""
    uniform = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    radius = tl.sqrt_rn(_log(uniform) * -2.0)
    turns = (angle_word >> 8).to(tl.int32)
    quarter = (turns + 2097152) >> 22  # 0..4: the nearest multiple of a quarter turn
    angle = (turns - (quarter << 22)).to(tl.float32) * _TURN
    square = angle * angle
    sine = ((square * -1.9515295891e-4 + 8.3321608736e-3) * square - 1.6666654611e-1) * square * angle + angle
    cosine = (square * 2.443315711809948e-5 - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - square * 0.5 + 1.0
    swap = (quarter & 1) == 1
    first = tl.where(swap, sine, cosine)
    second = tl.where(swap, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    second = tl.where((quarter & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def normals(seed, groups, sample, example_ids, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """float32 [BLOCK_N, BLOCK_D]: groups [BLOCK_D / 4] are column // 4, sample is uint32, ids int64 [BLOCK_N]."""
    ids = example_ids[:, None]
    low, high = (ids & 0xFFFFFFFF).to(tl.uint32), ((ids >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, groups[None, :].to(tl.uint32), sample, low, high)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK_N, BLOCK_D])
