//! `gaussian_log_prob`: -((x - mean) / sigma)^2 / 2 - log sigma - log(2 pi) / 2.

use crate::reduction::{Density, Parts};
use crate::simd::Lanes;
use crate::simd::special::exp;

const HALF_LN_TAU: f64 = 0.918_938_533_204_672_8;

/// `first` is the mean, `second` log sigma.
pub struct Gaussian;

impl Density for Gaussian {
    const NAME: &'static str = "gaussian_log_prob";
    const COUNTS: bool = false;
    const TWO: bool = true;
    const PREPARES: bool = false;
    const PREPARES_SLOPES: bool = false;

    /// 1 / sigma, log sigma.
    #[inline(always)]
    fn parts<V: Lanes>(log_sigma: f64) -> Parts {
        [exp::<V>(-log_sigma), log_sigma, 0.0, 0.0, 0.0, 0.0]
    }

    #[inline(always)]
    fn prepare<V: Lanes>(_: f64, _: Parts, _: f64) -> f64 {
        0.0
    }

    #[inline(always)]
    fn log_prob<V: Lanes>(x: f64, mean: f64, [inverse, log_sigma, ..]: Parts, _: f64) -> f64 {
        let residual = scaled(x, mean, inverse);
        let square = residual * residual;
        let value = -0.5 * square - log_sigma - HALF_LN_TAU;
        // sigma = 0 and x elsewhere: not infinity minus infinity
        if square == f64::INFINITY { f64::NEG_INFINITY } else { value }
    }

    #[inline(always)]
    fn prepare_slopes<V: Lanes>(_: f64, _: Parts) -> f64 {
        0.0
    }

    #[inline(always)]
    fn slopes<V: Lanes>(x: f64, mean: f64, [inverse, ..]: Parts, _: f64) -> (f64, f64) {
        let residual = scaled(x, mean, inverse);
        let slope = if residual == 0.0 { 0.0 } else { residual * inverse };
        (slope, residual * residual - 1.0)
    }
}

/// (x - mean) / sigma, and 0 at the mean whatever sigma is.
#[inline(always)]
fn scaled(x: f64, mean: f64, inverse: f64) -> f64 {
    let residual = x - mean;
    if residual == 0.0 { 0.0 } else { residual * inverse }
}
