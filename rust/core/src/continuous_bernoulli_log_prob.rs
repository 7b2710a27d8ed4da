//! `continuous_bernoulli_log_prob`: x l - log((exp(l) - 1) / l), the density on [0, 1] proportional to exp(x l).
//!
//! With a = |l|, log((exp(l) - 1) / l) is max(l, 0) + log((1 - exp(-a)) / a). Where a is small the last logarithm is
//! -a / 2 and a series in a^2, that of log(sinh(a / 2) / (a / 2)).

use crate::reduction::{Density, Parts};
use crate::simd::Lanes;
use crate::simd::special::{exp, ln, polynomial};

/// Below, the series.
const SMALL: f64 = 0.5;
/// B(2 k) / (2 k (2 k)!) from k = 7 down to 1, over a^(2 k).
const SERIES: [f64; 7] = [
    1.0 / 1_046_139_494_400.0,
    -691.0 / 15_692_092_416_000.0,
    1.0 / 479_001_600.0,
    -1.0 / 9_676_800.0,
    1.0 / 181_440.0,
    -1.0 / 2_880.0,
    1.0 / 24.0,
];
/// B(2 k) / (2 k)!, its derivative, over a^(2 k - 1).
const SLOPES: [f64; 7] = [
    1.0 / 74_724_249_600.0,
    -691.0 / 1_307_674_368_000.0,
    1.0 / 47_900_160.0,
    -1.0 / 1_209_600.0,
    1.0 / 30_240.0,
    -1.0 / 720.0,
    1.0 / 12.0,
];

/// `first` is the logit.
pub struct ContinuousBernoulli;

impl Density for ContinuousBernoulli {
    const NAME: &'static str = "continuous_bernoulli_log_prob";
    const COUNTS: bool = false;
    const TWO: bool = false;
    const PREPARES: bool = false;
    const PREPARES_SLOPES: bool = false;

    #[inline(always)]
    fn parts<V: Lanes>(_: f64) -> Parts {
        [0.0; 6]
    }

    #[inline(always)]
    fn prepare<V: Lanes>(_: f64, _: Parts, _: f64) -> f64 {
        0.0
    }

    #[inline(always)]
    fn log_prob<V: Lanes>(x: f64, logit: f64, _: Parts, _: f64) -> f64 {
        let size = logit.abs();
        let error = x - step(logit);
        let linear = if error == 0.0 { 0.0 } else { error * logit };
        let square = size * size;
        let near = 0.5 * size - square * polynomial::<V, 7>(SERIES, square);
        let far = -ln::<V>((1.0 - exp::<V>(-size)) / size);
        let value = linear + if size < SMALL { near } else { far };
        let certain = if error == 0.0 { f64::INFINITY } else { linear };
        // a NaN has no logarithm of its own here
        if size == f64::INFINITY { certain } else { value + 0.0 * size }
    }

    #[inline(always)]
    fn prepare_slopes<V: Lanes>(_: f64, _: Parts) -> f64 {
        0.0
    }

    /// x less the mean: x - [l > 0] +- (1 / a - 1 / (exp(a) - 1)).
    #[inline(always)]
    fn slopes<V: Lanes>(x: f64, logit: f64, _: Parts, _: f64) -> (f64, f64) {
        let size = logit.abs();
        let near = 0.5 - size * polynomial::<V, 7>(SLOPES, size * size);
        let factor = exp::<V>(-size);
        let far = 1.0 / size - factor / (1.0 - factor);
        let rest = if size < SMALL { near } else { far };
        (x - step(logit) + if logit > 0.0 { rest } else { -rest }, 0.0)
    }
}

#[inline(always)]
fn step(logit: f64) -> f64 {
    if logit > 0.0 { 1.0 } else { 0.0 }
}
