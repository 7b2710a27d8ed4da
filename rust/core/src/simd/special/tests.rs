//! Every level against the standard library, and against products where the functions are sums of logarithms.

#![allow(clippy::float_cmp)]

use super::*;
use crate::simd::{Kernel, Level, available, run};

/// Calls one of the functions on every value.
struct Map<'a>(&'a str, &'a [(f64, f64)]);

/// The functions under one roof, compiled for V.
#[inline(always)]
fn call<V: Lanes>(name: &str, x: f64, t: f64) -> f64 {
    match name {
        "exp" => exp::<V>(x),
        "ln" => ln::<V>(x),
        "ln_1p" => ln_1p::<V>(x),
        "ln_factorial" => ln_factorial::<V>(x),
        "rising" => ln_rising::<V>(x, t, rising_parts::<V>(t, t.ln())),
        _ => scaled_digamma_rise::<V>(x, t),
    }
}

impl Kernel for Map<'_> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Vec<f64> {
        self.1.iter().map(|&(x, t)| call::<V>(self.0, x, t)).collect()
    }
}

fn map(level: Level, name: &str, values: &[(f64, f64)]) -> Vec<f64> {
    run(level, Map(name, values))
}

fn close(level: Level, name: &str, values: &[(f64, f64)], relative: f64, truth: impl Fn(f64, f64) -> f64) {
    for (&(x, t), ours) in values.iter().zip(map(level, name, values)) {
        let truth = truth(x, t);
        let error = (ours - truth).abs() / truth.abs().max(1e-300);
        assert!(error < relative, "{level:?} {name}({x}, {t}) = {ours}, not {truth}: {error:e}");
    }
}

#[test]
fn elementary_functions_are_those_of_the_standard_library() {
    let exponents: Vec<_> = (-70_700..70_978).map(|i| (f64::from(i) * 0.01, 0.0)).collect();
    let positive: Vec<_> = (-1_000..1_000).map(|i| (1.37f64.powf(f64::from(i)), 0.0)).collect();
    let near_one: Vec<_> = (-2_000..2_000).map(|i| (1.0 + f64::from(i) * 1e-4 + 1e-7, 0.0)).collect();
    for level in available() {
        close(level, "exp", &exponents, 1e-15, |x, _| x.exp());
        close(level, "ln", &positive, 1e-15, |x, _| x.ln());
        close(level, "ln", &near_one, 1e-15, |x, _| x.ln());
        close(level, "ln_1p", &positive, 1e-15, |x, _| x.ln_1p());
        assert_eq!(map(level, "ln", &[(1.0, 0.0)]), [0.0]);
    }
}

#[test]
fn ends_are_exact() {
    let inf = f64::INFINITY;
    for level in available() {
        let ends = [(-inf, 0.0), (-710.0, 0.0), (0.0, 0.0), (709.79, 0.0), (inf, 0.0)];
        assert_eq!(map(level, "exp", &ends), [0.0, 0.0, 1.0, inf, inf], "{level:?}");
        let counts = [(-1.0, 0.0), (-0.5, 0.0), (0.0, 0.0), (1.0, 0.0), (inf, 0.0)];
        assert_eq!(map(level, "ln_factorial", &counts), [inf, inf, 0.0, 0.0, inf], "{level:?}");
        assert_eq!(map(level, "rising", &[(0.0, 2.0), (0.0, 1e20)]), [0.0, 0.0], "{level:?}");
        for name in ["exp", "ln_factorial", "rising", "digamma rise"] {
            assert!(map(level, name, &[(f64::NAN, 3.0)])[0].is_nan(), "{level:?} {name}");
        }
    }
}

#[test]
fn factorials_are_products() {
    let counts: Vec<_> = (2..400).map(|x| (f64::from(x), 0.0)).collect();
    // gamma(n + 1/2) = sqrt(pi) (2 n - 1)!! / 2^n
    let halves: Vec<_> = (2..300).map(|n| (f64::from(n) - 0.5, 0.0)).collect();
    let half_pi_ln = 0.5 * std::f64::consts::PI.ln();
    for level in available() {
        close(level, "ln_factorial", &counts, 4e-15, |x, _| (2..=x as u32).map(|k| f64::from(k).ln()).sum());
        close(level, "ln_factorial", &halves, 4e-14, |x, _| {
            half_pi_ln + (0..(x + 0.5) as u32).map(|k| (f64::from(k) + 0.5).ln()).sum::<f64>()
        });
        let huge = map(level, "ln_factorial", &[(1e18, 0.0)])[0];
        assert!((huge / (1e18 * (1e18f64.ln() - 1.0)) - 1.0).abs() < 1e-15);
    }
}

#[test]
fn rising_factorials_are_products_for_every_size_of_t() {
    let mut values = Vec::new();
    for t in [1e-40, 1e-6, 0.3, 1.0, 5.5, 7.999, 8.0, 30.0, 1e3, 1e5, 1e7, 1e12, 1e30] {
        values.extend([1, 2, 3, 7, 10, 200].map(|x| (f64::from(x), t)));
    }
    for level in available() {
        for (&(x, t), ours) in values.iter().zip(map(level, "rising", &values)) {
            let factors = (0..x as u32).map(|k| (f64::from(k) / t).ln_1p());
            let truth: f64 = factors.sum();
            assert!((ours - truth).abs() < 2e-14 * truth.abs().max(x), "{level:?} ({x}, {t}): {ours}, not {truth}");
        }
        for (&(x, t), ours) in values.iter().zip(map(level, "digamma rise", &values)) {
            let truth: f64 = (0..x as u32).map(|k| t / (t + f64::from(k))).sum();
            assert!((ours - truth).abs() < 4e-15 * x.max(t.min(1e3)), "{level:?} ({x}, {t}): {ours}, not {truth}");
        }
    }
}

struct Factorials<'a>(&'a [f64], usize);

impl Kernel for Factorials<'_> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Vec<f64> {
        let mut out = vec![f64::NAN; self.0.len()];
        ln_factorials::<V>(self.0, self.1, &mut out);
        out.truncate(self.1);
        out
    }
}

#[test]
fn small_counts_are_looked_up_and_others_are_not() {
    let counts: Vec<f64> = (0..256).map(f64::from).chain([0.5; 8]).collect();
    for level in available() {
        let looked_up = run(level, Factorials(&counts, 256));
        for (odd, value) in
            [(256.0, 1_167.257_278_562_9), (3.5, 2.453_736_570_8), (-1.0, f64::INFINITY), (f64::NAN, 0.0)]
        {
            let mut counts = counts.clone();
            counts[7] = odd;
            let computed = run(level, Factorials(&counts, 256));
            for (n, (a, b)) in looked_up.iter().zip(&computed).enumerate() {
                assert!(n == 7 || (a - b).abs() <= 1e-14 * b, "{level:?} {n}: {a} {b}");
            }
            assert!(computed[7] == value || (computed[7] - value).abs() < 1e-6 || odd.is_nan());
            assert_eq!(computed[7].is_nan(), odd.is_nan());
        }
    }
}
