//! `poisson_log_prob`: x log rate - rate - log x!.

use crate::reduction::{Density, Parts, impossible_if_undefined};
use crate::simd::Lanes;
use crate::simd::special::exp;

/// `first` is the logarithm of the rate.
pub struct Poisson;

impl Density for Poisson {
    const NAME: &'static str = "poisson_log_prob";
    const COUNTS: bool = true;
    const TWO: bool = false;
    const PREPARES: bool = true;
    const PREPARES_SLOPES: bool = false;

    #[inline(always)]
    fn parts<V: Lanes>(_: f64) -> Parts {
        [0.0; 6]
    }

    /// log x!
    #[inline(always)]
    fn prepare<V: Lanes>(_: f64, _: Parts, ln_factorial: f64) -> f64 {
        ln_factorial
    }

    #[inline(always)]
    fn log_prob<V: Lanes>(x: f64, log_rate: f64, _: Parts, ln_factorial: f64) -> f64 {
        let linear = if x == 0.0 { 0.0 } else { x * log_rate };
        let value = linear - exp::<V>(log_rate) - ln_factorial;
        impossible_if_undefined(value, x, log_rate)
    }

    #[inline(always)]
    fn prepare_slopes<V: Lanes>(_: f64, _: Parts) -> f64 {
        0.0
    }

    #[inline(always)]
    fn slopes<V: Lanes>(x: f64, log_rate: f64, _: Parts, _: f64) -> (f64, f64) {
        let slope = x - exp::<V>(log_rate);
        (if x < 0.0 { 0.0 } else { slope }, 0.0)
    }
}
