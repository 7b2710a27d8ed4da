"""The logistic's mass on one of L even levels of [-1, 1]: what the kernels of the discretised likelihoods share.

Level v = 0 .. T, T = L - 1, is x = n / T with n = 2 v - T. Its ends are `lower` = n - 1 - T mean and `upper` =
n + 1 - T mean half levels from the mean; with a = upper / (T s), b = lower / (T s) and t = a - b the mass is
(1 - exp(-t)) / ((1 + exp(-a)) (1 + exp(b))), without the part of b at the lowest level, of a at the highest, of t at
both. Nothing is lost by subtracting two values of the distribution function.
"""

import triton
import triton.language as tl

# A distance of 0 times the rate of an infinitely narrow logistic is 0: the rate stays finite.
_FASTEST = tl.constexpr(1.6e38)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1]."""
    shifted = 1.0 + x
    return tl.log(shifted) - ((shifted - 1.0) - x) / shifted  # puts back what 1 + x lost


@triton.jit
def level(x, top):
    """The nearest level; the lowest or highest beyond the ends, NaN for NaN."""
    half = top * 0.5
    scaled = x * half + half
    found = tl.floor(scaled + 0.5)
    found = tl.where(found < 0, 0.0, tl.where(found > top, top, found))
    return tl.where(scaled == scaled, found, scaled)


@triton.jit
def ends(lower, upper, log_scale, top):
    """a, b, t and the rate 1 / s."""
    rate = tl.exp(-log_scale)
    rate = tl.where(rate > _FASTEST, _FASTEST, rate)
    scaled = rate / top
    return upper * scaled, lower * scaled, 2.0 * scaled, rate


@triton.jit
def _even(width):
    """t / (1 - exp(-t)) - 1 - t / 2 by the Bernoulli numbers, for t below 0.5."""
    square = width * width
    tail = 1.0 / 30240.0 + square * (-1.0 / 1209600.0 + square * (1.0 / 47900160.0))
    return square * (1.0 / 12.0 + square * (-1.0 / 720.0 + square * tail))


@triton.jit
def log_mass(v, a, b, width, log_scale, top):
    """The logarithm of the mass on level v."""
    below = tl.where(a < 0, a, 0.0) - log1p(tl.exp(-tl.abs(a)))
    above = tl.where(b > 0, -b, 0.0) - log1p(tl.exp(-tl.abs(b)))
    # log(1 - exp(-t)): log t less log(t / (1 - exp(-t))) where t is small
    small = tl.where(width < 0.5, width, 0.0)
    narrow = (tl.log(2.0 / top) - log_scale) - tl.log(1.0 + (small * 0.5 + _even(small)))
    wide = tl.log(1.0 - tl.exp(-tl.where(width < 0.5, 1.0, width)))
    inside = tl.where(width < 0.5, narrow, wide)
    lowest, highest = v == 0, v == top
    total = tl.where(highest, 0.0, below) + tl.where(lowest, 0.0, above) + tl.where(lowest | highest, 0.0, inside)
    return tl.where(v == v, total, v)


@triton.jit
def slopes(v, a, b, width, rate, top):
    """The derivatives of `log_mass` in the mean and in the logarithm of the scale."""
    lowest, highest = v == 0, v == top
    factor_a, factor_b = tl.exp(-tl.abs(a)), tl.exp(-tl.abs(b))
    of_a = tl.where(a > 0, factor_a, 1.0) / (1.0 + factor_a)
    of_b = tl.where(b > 0, 1.0, factor_b) / (1.0 + factor_b)
    of_a, of_b = tl.where(highest, 0.0, of_a), tl.where(lowest, 0.0, of_b)
    factor, small = tl.exp(-width), tl.where(width < 0.5, width, 0.0)
    large = width * factor / (1.0 - tl.where(width < 0.5, 0.0, factor))
    of_width = tl.where(width < 0.5, 1.0 - small * 0.5 + _even(small), large)
    of_width = tl.where(lowest | highest, 0.0, of_width)
    # 0 times infinity is 0 here.
    by_a, by_b = tl.where(of_a == 0, 0.0, a * of_a), tl.where(of_b == 0, 0.0, b * of_b)
    nan = tl.where(v == v, 0.0, v)
    return rate * (of_b - of_a) + nan, by_b - by_a - of_width + nan
