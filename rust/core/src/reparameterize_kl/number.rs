//! The element types: `f32`, `f64`, `bf16` and `f16`, computed in `f32` (`f64` for `f64`).

use std::fmt::Debug;
use std::ops::{Add, Mul, Sub};

use half::{bf16, f16};

/// What is computed in.
pub trait Real: Number<Work = Self> + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> {
    /// 0.
    const ZERO: Self;
    /// 1/2.
    const HALF: Self;
    /// Of the log of a variance: the standard deviation, and the variance minus 1 without cancellation.
    fn deviation_and_excess(self) -> (Self, Self);
    /// A standard normal.
    fn from_f32(value: f32) -> Self;
    /// Rounded.
    fn from_f64(value: f64) -> Self;
    /// Exactly.
    fn to_f64(self) -> f64;
}

/// An element of a tensor.
pub trait Number: Copy + Send + Sync + Debug {
    /// What it is computed in.
    type Work: Real;
    /// Exactly.
    fn work(self) -> Self::Work;
    /// 0.
    fn zero() -> Self {
        Self::round(Self::Work::ZERO)
    }
    /// Rounded to nearest, ties to even.
    fn round(value: Self::Work) -> Self;
}

impl Number for f32 {
    type Work = f32;

    #[inline(always)]
    fn work(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
}

impl Number for f64 {
    type Work = f64;

    #[inline(always)]
    fn work(self) -> f64 {
        self
    }

    #[inline(always)]
    fn round(value: f64) -> f64 {
        value
    }
}

impl Number for bf16 {
    type Work = f32;

    #[inline(always)]
    fn work(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn round(value: f32) -> bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
        let quiet = bits >> 16 | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }
}

impl Number for f16 {
    type Work = f32;

    #[inline(always)]
    fn work(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let (sign, rest) = ((bits & 0x8000) << 16, (bits & 0x7FFF) << 13);
        let finite = (f32::from_bits(rest) * f32::from_bits((254 - 15) << 23)).to_bits(); // 2^112
        f32::from_bits(sign | if rest < 0x7C00 << 13 { finite } else { rest | 0x7F80_0000 })
    }

    #[inline(always)]
    fn round(value: f32) -> f16 {
        let (sign, rest) = (value.to_bits() >> 16 & 0x8000, value.to_bits() & 0x7FFF_FFFF);
        let normal = rest.wrapping_sub(112 << 23).wrapping_add(0xFFF + (rest >> 13 & 1)) >> 13;
        // Below 2^-14: adding 1/2 leaves the bits that remain at the end of the sum, rounded.
        let subnormal = (f32::from_bits(rest) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        let finite = if rest < 113 << 23 { subnormal } else { normal };
        let special = if rest > 0x7F80_0000 { 0x7E00 | rest >> 13 & 0x3FF } else { 0x7C00 };
        f16::from_bits((sign | if rest < (127 + 16) << 23 { finite } else { special }) as u16)
    }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const HALF: f32 = 0.5;

    #[inline(always)]
    fn deviation_and_excess(self) -> (f32, f32) {
        let (deviation, less_one) = exp(self * 0.5);
        (deviation, less_one * (deviation + 1.0))
    }

    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn from_f64(value: f64) -> f32 {
        value as f32
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const HALF: f64 = 0.5;

    #[inline(always)]
    fn deviation_and_excess(self) -> (f64, f64) {
        ((self * 0.5).exp(), self.exp_m1())
    }

    #[inline(always)]
    fn from_f32(value: f32) -> f64 {
        f64::from(value)
    }

    #[inline(always)]
    fn from_f64(value: f64) -> f64 {
        value
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
}

/// exp x and exp x - 1, with a relative error of about 1e-7 each: 2^power exp(rest), |rest| <= ln 2 / 2 (Cephes, the
/// polynomial in pairs: its chain of dependent instructions is what a loop over vectors waits for). 0 below 1.6e-38.
#[inline(always)]
fn exp(x: f32) -> (f32, f32) {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, in the low bits of the sum
    // Beyond these the result is infinity, or 0; a NaN passes through both.
    let x = if x > 88.8 { 88.8 } else { x };
    let x = if x < -87.2 { -87.2 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let rest = x - power * 0.693_359_4 + power * 2.121_944_4e-4;
    let square = rest * rest;
    let high = (1.987_569_1e-4 * rest + 1.398_199_9e-3) * square + (8.333_452e-3 * rest + 4.166_579_6e-2);
    let growth = (high * square + (1.666_666_6e-1 * rest + 0.5)) * square + rest;
    // Half of 2^power: a normal number up to 2^128 / 2, and 0 at the lower end.
    let half = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(126) << 23);
    let value = (growth + 1.0) * half * 2.0;
    (value, if power == 0.0 { growth } else { value - 1.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_accurate_over_the_whole_range() {
        for step in -170_000..=170_000 {
            let logvar = step as f32 * 1e-3;
            let (deviation, excess) = logvar.deviation_and_excess();
            let truth = (f64::from(logvar) * 0.5).exp();
            assert!((f64::from(deviation) / truth - 1.0).abs() < 1.5e-7 || truth > f64::from(f32::MAX), "{logvar}");
            let truth = f64::from(logvar).exp_m1();
            assert!((f64::from(excess) - truth).abs() <= 4e-7 * truth.abs() || truth > f64::from(f32::MAX), "{logvar}");
        }
    }

    #[test]
    #[allow(clippy::float_cmp)]
    fn extremes() {
        assert_eq!(f32::INFINITY.deviation_and_excess(), (f32::INFINITY, f32::INFINITY));
        assert_eq!(f32::NEG_INFINITY.deviation_and_excess(), (0.0, -1.0));
        assert_eq!(0.0_f32.deviation_and_excess(), (1.0, 0.0));
        assert!(f32::NAN.deviation_and_excess().0.is_nan() && f32::NAN.deviation_and_excess().1.is_nan());
    }

    #[test]
    fn halves_round_as_the_half_crate_does() {
        let ties = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32().to_bits().wrapping_add(0x1000));
        for bits in (0..=u32::MAX).step_by(8191).chain(ties) {
            let value = f32::from_bits(bits);
            assert_eq!(<bf16 as Number>::round(value).to_bits(), bf16::from_f32(value).to_bits(), "{value}");
            assert_eq!(<f16 as Number>::round(value).to_bits(), f16::from_f32(value).to_bits(), "{value}");
        }
        for bits in 0..=u16::MAX {
            let (brain, half) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert!(brain.is_nan() || brain.work().to_bits() == brain.to_f32().to_bits());
            assert!(half.is_nan() || half.work().to_bits() == half.to_f32().to_bits());
        }
    }
}
