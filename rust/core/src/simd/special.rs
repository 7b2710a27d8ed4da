//! Exponential, logarithm and the gamma function's relatives in `f64`, written for loops that a compiler vectorises:
//! no branch, call or table. Relative errors are some 1e-15.
//!
//! `V` only says whether a multiply-add may be one instruction.

#[cfg(test)]
mod tests;

use std::f64::consts::LOG2_E;
use std::sync::OnceLock;

use super::Lanes;

/// Adding this rounds to an integer, which is left in the low mantissa bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// ln 2 in two parts: products of the first with an exponent are exact.
const LN_2_HIGH: f64 = 0.693_147_180_369_123_8;
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// exp of more overflows.
const HIGHEST: f64 = 709.782_712_893_384;
/// exp of less is taken as 0: it would be less than 5e-308.
const LOWEST: f64 = -707.0;
/// 1 / n! from n = 12 down to 2.
const EXP: [f64; 11] = [
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
];
/// 2 / (2 k + 1) from k = 9 down to 1: the inverse hyperbolic tangent.
const ATANH: [f64; 9] =
    [2.0 / 19.0, 2.0 / 17.0, 2.0 / 15.0, 2.0 / 13.0, 2.0 / 11.0, 2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0];
/// Of Stirling's series in 1 / y^2, highest first: ln gamma(y) less its elementary part is y times it, over y^2.
const STIRLING: [f64; 7] =
    [1.0 / 156.0, -691.0 / 360_360.0, 1.0 / 1_188.0, -1.0 / 1_680.0, 1.0 / 1_260.0, -1.0 / 360.0, 1.0 / 12.0];
/// The same for the digamma function: ln(y) - 1 / (2 y) - digamma(y) is it over y^2.
const DIGAMMA: [f64; 7] =
    [1.0 / 12.0, -691.0 / 32_760.0, 1.0 / 132.0, -1.0 / 240.0, 1.0 / 252.0, -1.0 / 120.0, 1.0 / 12.0];
/// From here on the series are used as they are; below, the argument is raised by 8 first.
const ASYMPTOTIC: f64 = 8.0;
const HALF_LN_TAU: f64 = 0.918_938_533_204_672_8;

/// `a * b + c`, fused where that is one instruction.
#[inline(always)]
pub fn mul_add<V: Lanes>(a: f64, b: f64, c: f64) -> f64 {
    if V::FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// The polynomial with these coefficients, highest first.
#[inline(always)]
pub fn polynomial<V: Lanes, const N: usize>(coefficients: [f64; N], x: f64) -> f64 {
    let (mut value, mut term) = (coefficients[0], 1);
    while term < N {
        value = mul_add::<V>(value, x, coefficients[term]);
        term += 1;
    }
    value
}

/// exp(x): 0 below -707, infinite above 709.78, NaN for NaN.
#[inline(always)]
pub fn exp<V: Lanes>(x: f64) -> f64 {
    let bounded = if x < LOWEST { LOWEST } else { x };
    let bounded = if bounded > HIGHEST { HIGHEST } else { bounded };
    let shifted = mul_add::<V>(bounded, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<V>(n, -LN_2_LOW, mul_add::<V>(n, -LN_2_HIGH, bounded));
    let series = polynomial::<V, 11>(EXP, r);
    let value = mul_add::<V>(series * r, r, r) + 1.0;
    // Half of 2^n, because 2^1024 is none.
    let half = f64::from_bits(shifted.to_bits().wrapping_add(1022) << 52);
    let value = if x > HIGHEST { f64::INFINITY } else { value * half * 2.0 };
    if x < LOWEST { 0.0 } else { value }
}

/// ln(x) of a positive, normal, finite number; anything for others.
#[inline(always)]
pub fn ln<V: Lanes>(x: f64) -> f64 {
    ln_sum::<V>(x, 0.0)
}

/// ln(1 + x) for finite x >= 0.
#[inline(always)]
pub fn ln_1p<V: Lanes>(x: f64) -> f64 {
    let sum = 1.0 + x;
    ln_sum::<V>(sum, x - (sum - 1.0))
}

/// ln(x + residue), the residue being less than the last digit of x.
#[inline(always)]
fn ln_sum<V: Lanes>(x: f64, residue: f64) -> f64 {
    /// Of the square root of 1/2.
    const LEAST: u64 = 0x3FE6_A09E_667F_3BCD;
    const BIAS: u64 = 1024 << 52;
    let bits = x.to_bits();
    // The exponent plus 1024 above the mantissa's 52 bits; what is left of x lies between the roots of 1/2 and 2.
    let raised = bits.wrapping_sub(LEAST).wrapping_add(BIAS);
    let rest = f64::from_bits(bits.wrapping_add(BIAS).wrapping_sub(raised & (0xFFF << 52)));
    // 2 to the minus exponent
    let scale = f64::from_bits((2047_u64 << 52).wrapping_sub(raised & (0xFFF << 52)));
    // The integer as a number: the mantissa of 2^52 and more.
    let exponent = f64::from_bits((raised >> 52) | 0x4330_0000_0000_0000) - (4_503_599_627_370_496.0 + 1024.0);
    let above = mul_add::<V>(residue, scale, rest - 1.0);
    let s = above / (2.0 + above);
    let square = s * s;
    let tail = s * square * polynomial::<V, 9>(ATANH, square);
    mul_add::<V>(exponent, LN_2_HIGH, mul_add::<V>(exponent, LN_2_LOW, 2.0 * s + tail))
}

/// z (z + 1) ... (z + 7).
#[inline(always)]
fn eight_factors(z: f64) -> f64 {
    (z * (z + 1.0)) * ((z + 2.0) * (z + 3.0)) * (((z + 4.0) * (z + 5.0)) * ((z + 6.0) * (z + 7.0)))
}

/// z (z + 1) ... (z + 7) and its derivative in z.
#[inline(always)]
fn eight_factors_and_slope<V: Lanes>(z: f64) -> (f64, f64) {
    let (mut product, mut slope, mut k) = (z, 1.0, 1);
    while k < 8 {
        let factor = z + f64::from(k);
        slope = mul_add::<V>(slope, factor, product);
        product *= factor;
        k += 1;
    }
    (product, slope)
}

/// ln gamma(y) - ((y - 1/2) ln y - y + ln(2 pi) / 2) for y >= 8, of 1 / y.
#[inline(always)]
fn stirling<V: Lanes>(inverse: f64) -> f64 {
    inverse * polynomial::<V, 7>(STIRLING, inverse * inverse)
}

/// ln(y) - 1 / (2 y) - digamma(y) for y >= 8, of 1 / y.
#[inline(always)]
fn digamma_rest<V: Lanes>(inverse: f64) -> f64 {
    let square = inverse * inverse;
    square * polynomial::<V, 7>(DIGAMMA, square)
}

/// Of ln x! = ln gamma(x + 1): y >= 8 and the product with which it is (y - 1/2) ln y - y + ... - ln(product).
#[inline(always)]
fn raised_factorial(x: f64) -> (f64, f64) {
    let z = x + 1.0;
    let low = z < ASYMPTOTIC;
    (if low { z + 8.0 } else { z }, if low { eight_factors(z) } else { 1.0 })
}

/// ln gamma(y) for y >= 8, of y and 1 / y.
#[inline(always)]
fn ln_gamma<V: Lanes>(y: f64, inverse: f64) -> f64 {
    mul_add::<V>(y - 0.5, ln::<V>(y), HALF_LN_TAU - y) + stirling::<V>(inverse)
}

/// ln(x!) = ln gamma(x + 1): 0 exactly at 0 and 1, infinite at infinity and below 0, NaN for NaN.
#[inline(always)]
#[allow(clippy::float_cmp)]
pub fn ln_factorial<V: Lanes>(x: f64) -> f64 {
    let (y, product) = raised_factorial(x);
    let value = ln_gamma::<V>(y, 1.0 / y) - ln::<V>(product);
    let value = if x == 0.0 || x == 1.0 { 0.0 } else { value };
    if x < 0.0 || x == f64::INFINITY { f64::INFINITY } else { value }
}

/// ln(x!) of the first `length` numbers into `out`; slices of equal length, behind `length` anything is written.
#[inline(always)]
pub fn ln_factorials<V: Lanes>(x: &[f64], length: usize, out: &mut [f64]) {
    static TABLE: OnceLock<[f64; 256]> = OnceLock::new();
    let (mut small, mut at) = (true, 0);
    while at < length {
        // only whole numbers up to 255 survive the conversion
        small &= f64::from(x[at] as u8).to_bits() == (x[at] + 0.0).to_bits();
        at += 1;
    }
    at = 0;
    if small {
        let table = TABLE.get_or_init(|| {
            let (mut table, mut sum) = ([0.0; 256], 0.0);
            for (n, entry) in table.iter_mut().enumerate().skip(1) {
                sum += (n as f64).ln();
                *entry = sum;
            }
            table
        });
        while at < length {
            out[at] = table[usize::from(x[at] as u8)];
            at += 1;
        }
    } else {
        let out = &mut out[..x.len()];
        while at < x.len() {
            out[at] = ln_factorial::<V>(x[at]);
            at += 1;
        }
    }
}

/// What [`ln_rising`] needs of t = exp(ln_t) alone, ln_t from -100 to 85.
#[inline(always)]
pub fn rising_parts<V: Lanes>(t: f64, ln_t: f64) -> [f64; 3] {
    let low = t < ASYMPTOTIC;
    let base = if low { t + 8.0 } else { t };
    let inverse = 1.0 / base;
    [inverse, stirling::<V>(inverse), if low { ln::<V>(base) - ln_t } else { 0.0 }]
}

/// ln(gamma(x + t) / (gamma(t) t^x)) for x from 0 to 10^37: 0 exactly at x = 0.
///
/// No two large terms are subtracted however large t is, as in ln gamma(x + t) - ln gamma(t).
#[inline(always)]
pub fn ln_rising<V: Lanes>(x: f64, t: f64, [inverse, of_base, raised]: [f64; 3]) -> f64 {
    let low = t < ASYMPTOTIC;
    let sum = x + if low { t + 8.0 } else { t };
    let ratio = if low { eight_factors(x + t) / eight_factors(t) } else { 1.0 };
    let growth = mul_add::<V>(sum - 0.5, ln_1p::<V>(x * inverse), x * (raised - 1.0));
    let value = growth + (stirling::<V>(1.0 / sum) - of_base) - ln::<V>(ratio);
    if x == 0.0 { 0.0 } else { value }
}

/// t (digamma(x + t) - digamma(t)): 0 exactly at x = 0. For x from 0 to 10^37 and t > 0.
#[inline(always)]
pub fn scaled_digamma_rise<V: Lanes>(x: f64, t: f64) -> f64 {
    let low = t < ASYMPTOTIC;
    let base = if low { t + 8.0 } else { t };
    let sum = base + x;
    let inverse = 1.0 / (base * sum);
    let (of_base, of_sum) = (inverse * sum, inverse * base);
    let rise = ln_1p::<V>(x * of_base) + 0.5 * x * inverse + (digamma_rest::<V>(of_base) - digamma_rest::<V>(of_sum));
    // the sums of 1 / (t + k) and 1 / (x + t + k) over k = 0 .. 7
    let ((lower, lower_slope), (upper, upper_slope)) =
        (eight_factors_and_slope::<V>(t), eight_factors_and_slope::<V>(x + t));
    let lowered = if low { lower_slope / lower - upper_slope / upper } else { 0.0 };
    if x == 0.0 { 0.0 } else { t * (rise + lowered) }
}
