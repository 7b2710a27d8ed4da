//! `negative_binomial_log_prob`, with mean mu and inverse dispersion theta.
//!
//! log p = x log mu - (x + theta) log(1 + mu / theta) + log(gamma(x + theta) / (gamma(theta) theta^x x!)): for large
//! theta every term stays as large as its Poisson counterpart, x log mu - mu - log x!.

use crate::reduction::{Density, Parts, impossible_if_undefined};
use crate::simd::Lanes;
use crate::simd::special::{exp, ln_1p, ln_rising, rising_parts, scaled_digamma_rise};

/// Beyond, theta is taken as infinite: the Poisson distribution, to one part in 10^36.
const HIGHEST: f64 = 85.0;
/// Below, log p is linear in log theta where x > 0.
const LOWEST: f64 = -100.0;

/// `first` is log mu, `second` log theta.
pub struct NegativeBinomial;

impl Density for NegativeBinomial {
    const NAME: &'static str = "negative_binomial_log_prob";
    const COUNTS: bool = true;
    const TWO: bool = true;
    const PREPARES: bool = true;
    const PREPARES_SLOPES: bool = true;

    /// theta, its logarithm, three parts of [`ln_rising`], and what log p has below the lowest log theta.
    #[inline(always)]
    fn parts<V: Lanes>(log_theta: f64) -> Parts {
        let bounded = bounded(log_theta);
        let theta = exp::<V>(bounded);
        let [one, two, three] = rising_parts::<V>(theta, bounded);
        [theta, bounded, one, two, three, if log_theta < LOWEST { log_theta - LOWEST } else { 0.0 }]
    }

    /// log(gamma(x + theta) / (gamma(theta) theta^x x!))
    #[inline(always)]
    fn prepare<V: Lanes>(x: f64, [theta, _, one, two, three, beyond]: Parts, ln_factorial: f64) -> f64 {
        let value = ln_rising::<V>(x, theta, [one, two, three]) - ln_factorial + beyond;
        let value = if x == 0.0 { 0.0 } else { value };
        if ln_factorial == f64::INFINITY { f64::NEG_INFINITY } else { value }
    }

    #[inline(always)]
    fn log_prob<V: Lanes>(x: f64, log_mu: f64, [theta, log_theta, ..]: Parts, rising: f64) -> f64 {
        let linear = if x == 0.0 { 0.0 } else { x * log_mu };
        let (softplus, _) = ratio::<V>(log_mu - log_theta);
        let value = linear - (x + theta) * softplus + rising;
        impossible_if_undefined(value, x, log_mu.abs() + log_theta.abs())
    }

    /// theta (digamma(x + theta) - digamma(theta)).
    #[inline(always)]
    fn prepare_slopes<V: Lanes>(x: f64, [theta, ..]: Parts) -> f64 {
        scaled_digamma_rise::<V>(x, theta)
    }

    #[inline(always)]
    fn slopes<V: Lanes>(x: f64, log_mu: f64, [theta, log_theta, ..]: Parts, rise: f64) -> (f64, f64) {
        let (softplus, (share, rest)) = ratio::<V>(log_mu - log_theta);
        let first = x * rest - theta * share;
        let second = rise - theta * softplus - first;
        if x < 0.0 { (0.0, 0.0) } else { (first, second) }
    }
}

#[inline(always)]
fn bounded(log_theta: f64) -> f64 {
    let value = if log_theta > HIGHEST { HIGHEST } else { log_theta };
    if value < LOWEST { LOWEST } else { value }
}

/// Of u = log(mu / theta): log(1 + mu / theta), and (mu, theta) / (mu + theta).
#[inline(always)]
fn ratio<V: Lanes>(u: f64) -> (f64, (f64, f64)) {
    let factor = exp::<V>(-u.abs());
    let inverse = 1.0 / (1.0 + factor);
    let (large, small) = (inverse, factor * inverse);
    let softplus = if u > 0.0 { u } else { 0.0 } + ln_1p::<V>(factor);
    // a NaN is neither above nor below 0
    let softplus = if u.is_nan() { u } else { softplus };
    (softplus, if u > 0.0 { (large, small) } else { (small, large) })
}
