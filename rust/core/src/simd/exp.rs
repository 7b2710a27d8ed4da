//! The exponential function of lanes.

use std::f32::consts::{LN_2, LOG2_E};

use super::Lanes;

/// Below this the result is 0 (it would be denormal, less than 1.2e-38).
const LOWEST: f32 = -88.0;
/// Its exponential is the largest that is given, finite.
const HIGHEST: f32 = 88.0;
/// Adding this rounds to an integer, and leaves that integer plus 127 (the exponent's bias) in the low mantissa bits.
const ROUND: f32 = 12_582_912.0 + 127.0;
/// ln 2 in two parts: products of the first with a small integer are exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// exp(r) is about 1 + r (C0 + C1 r + ...) for |r| <= ln(2) / 2: minimax, relative error 9.2e-8.
const C: [f32; 5] = [0.999_999_7, 0.499_991_45, 0.166_676_4, 0.041_898_39, 0.008_290_23];

/// exp(-|x|), relative error below 5e-7; 0 below 1.2e-38, NaN for NaN.
#[inline(always)]
pub fn exp_negative_abs<V: Lanes>(x: V) -> V {
    exp_within(x.negative_abs().at_least(V::splat(LOWEST)))
}

/// exp(x), relative error below 5e-7; 0 below 1.2e-38, never above exp(88) = 1.65e38, NaN for NaN.
#[inline(always)]
pub fn exp<V: Lanes>(x: V) -> V {
    exp_within(x.at_least(V::splat(LOWEST)).at_most(V::splat(HIGHEST)))
}

/// exp(-|x|) - 1, relative error below 1e-6 also where it is tiny; NaN for NaN.
#[inline(always)]
pub fn exp_m1_negative_abs<V: Lanes>(x: V) -> V {
    let (p, r, power) = reduced(x.negative_abs().at_least(V::splat(LOWEST)));
    p.mul(r).mul_add(power, power.sub(V::splat(1.0)))
}

/// exp(a) for a from `LOWEST` to `HIGHEST`.
#[inline(always)]
fn exp_within<V: Lanes>(a: V) -> V {
    let (p, r, power) = reduced(a);
    p.mul_add(r, V::splat(1.0)).mul(power)
}

/// p, r and a power of two, such that exp(a) = (1 + p r) times the power.
#[inline(always)]
fn reduced<V: Lanes>(a: V) -> (V, V, V) {
    let shifted = a.mul_add(V::splat(LOG2_E), V::splat(ROUND));
    let n = shifted.sub(V::splat(ROUND));
    let r = if V::FUSED {
        n.mul_add(V::splat(-LN_2), a)
    } else {
        n.mul_add(V::splat(-LN_2_LOW), n.mul_add(V::splat(-LN_2_HIGH), a))
    };
    let mut p = V::splat(C[4]);
    p = p.mul_add(r, V::splat(C[3]));
    p = p.mul_add(r, V::splat(C[2]));
    p = p.mul_add(r, V::splat(C[1]));
    p = p.mul_add(r, V::splat(C[0]));
    (p, r, shifted.low_bits_to_exponent())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, available, run};

    /// exp(x), exp(-|x|) or exp(-|x|) - 1 of every x.
    struct Exp<'a, const WHICH: u8>(&'a [f32], &'a mut [f32]);

    impl<const WHICH: u8> Kernel for Exp<'_, WHICH> {
        type Output = ();

        #[inline(always)]
        fn run<V: Lanes>(self) {
            let mut at = 0;
            while at < self.0.len() {
                let x = V::load(self.0, at);
                let y = match WHICH {
                    0 => exp(x),
                    1 => exp_negative_abs(x),
                    _ => exp_m1_negative_abs(x),
                };
                y.store(self.1, at);
                at += V::COUNT;
            }
        }
    }

    fn apply<const WHICH: u8>(level: crate::simd::Level, mut x: Vec<f32>) -> Vec<f32> {
        let length = x.len();
        x.resize(length.next_multiple_of(16), 0.0);
        let mut y = vec![f32::NAN; x.len()];
        run(level, Exp::<WHICH>(&x, &mut y));
        y.truncate(length);
        y
    }

    fn at(level: crate::simd::Level, x: Vec<f32>) -> Vec<f32> {
        apply::<1>(level, x)
    }

    #[test]
    fn what_is_missing_to_one_is_accurate_where_it_is_tiny() {
        let x: Vec<f32> = (1..200_000).map(|i| 1e-9 * 1.000_13_f32.powi(i)).collect();
        for level in available() {
            for (&x, y) in x.iter().zip(apply::<2>(level, x.clone())) {
                let truth = (-f64::from(x)).exp_m1();
                assert!((f64::from(y) / truth - 1.0).abs() < 1e-6, "{level:?}: exp(-{x}) - 1 = {y}, not {truth}");
            }
            assert!(apply::<2>(level, vec![f32::NAN])[0].is_nan());
        }
    }

    #[test]
    fn both_signs_are_accurate_and_the_ends_are_finite() {
        let x: Vec<f32> = (-170_000..172_000).map(|i| i as f32 * 5.1e-4).collect();
        for level in available() {
            for (&x, y) in x.iter().zip(apply::<0>(level, x.clone())) {
                let truth = f64::from(x).exp();
                assert!((f64::from(y) / truth - 1.0).abs() < 5e-7, "{level:?}: exp({x}) = {y}, not {truth}");
            }
            let ends = vec![f32::NEG_INFINITY, -88.0, 0.0, 88.0, 1e6, f32::INFINITY, f32::NAN];
            let y = apply::<0>(level, ends);
            assert_eq!((y[0], y[1], y[2]), (0.0, 0.0, 1.0), "{level:?}");
            assert!(y[3..6].iter().all(|y| (1.6e38..1.7e38).contains(y)) && y[6].is_nan(), "{level:?}");
        }
    }

    #[test]
    fn relative_error_is_small_on_every_level() {
        let x: Vec<f32> = (-170_000..170_000).map(|i| i as f32 * 5.1e-4).collect();
        for level in available() {
            for (&x, y) in x.iter().zip(at(level, x.clone())) {
                let truth = (-f64::from(x).abs()).exp();
                assert!((f64::from(y) / truth - 1.0).abs() < 5e-7, "{level:?}: exp(-|{x}|) = {y}, not {truth}");
            }
        }
    }

    #[test]
    fn ends_are_exact_on_every_level() {
        let x = vec![0.0, -0.0, 88.0, -100.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN];
        for level in available() {
            let y = at(level, x.clone());
            assert_eq!(y[..7], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], "{level:?}");
            assert!(y[7..].iter().all(|y| y.is_nan()), "{level:?}: {y:?}");
        }
    }
}
