//! Every density at every level against the formula in the standard library's functions; rows that meet others,
//! tails, element types, threads.

#![allow(clippy::float_cmp)]

use half::{bf16, f16};

use super::*;
use crate::continuous_bernoulli_log_prob::ContinuousBernoulli;
use crate::gaussian_log_prob::Gaussian;
use crate::negative_binomial_log_prob::NegativeBinomial;
use crate::poisson_log_prob::Poisson;
use crate::simd::available;

/// Numbers in [0, 1) that look random.
fn noise(seed: u32, count: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            f64::from(state) / 4_294_967_296.0
        })
        .collect()
}

fn operand(numbers: &[f64], width: usize) -> Operand<'_> {
    Operand { numbers: Numbers::F64(numbers), width }
}

fn whole<'a>(x: &'a [f64], first: &'a [f64], second: &'a [f64], columns: usize) -> Operands<'a> {
    Operands { x: operand(x, columns), first: operand(first, columns), second: operand(second, columns), columns }
}

fn totals<D: Density>(level: Level, operands: Operands, rows: usize, threads: usize) -> Vec<f64> {
    let mut out = vec![f64::NAN; rows];
    log_prob_at::<D>(level, operands, NumbersMut::F64(&mut out), threads).unwrap();
    out
}

fn slopes<D: Density>(level: Level, operands: Operands, grad: &[f64], threads: usize) -> (Vec<f64>, Vec<f64>) {
    let (rows, width) = (grad.len(), operands.second.width);
    let (mut first, mut second) = (vec![f64::NAN; rows * operands.columns], vec![f64::NAN; rows * width]);
    let (one, two) = (NumbersMut::F64(&mut first), NumbersMut::F64(&mut second));
    gradients_at::<D>(level, operands, Numbers::F64(grad), Some(one), Some(two), threads).unwrap();
    (first, second)
}

fn gaussian(x: f64, mean: f64, log_sigma: f64) -> f64 {
    -0.5 * ((x - mean) / log_sigma.exp()).powi(2) - log_sigma - 0.5 * std::f64::consts::TAU.ln()
}

fn continuous_bernoulli(x: f64, logit: f64, _: f64) -> f64 {
    if logit == 0.0 { 0.0 } else { x * logit - (logit.exp_m1() / logit).ln() }
}

fn poisson(x: f64, log_rate: f64, _: f64) -> f64 {
    x * log_rate - log_rate.exp() - (1..=x as u32).map(|k| f64::from(k).ln()).sum::<f64>()
}

/// gamma(x + t) / gamma(t) is a product for whole x.
fn negative_binomial(x: f64, log_mu: f64, log_theta: f64) -> f64 {
    let (mu, theta) = (log_mu.exp(), log_theta.exp());
    let factors = (0..x as u32).map(|k| ((theta + f64::from(k)) / f64::from(k + 1)).ln());
    factors.sum::<f64>() + x * (mu / (mu + theta)).ln() - theta * (mu / theta).ln_1p()
}

/// Values of whole rows, and the slopes by central differences.
fn against<D: Density>(truth: fn(f64, f64, f64) -> f64, data: fn(f64) -> f64, spread: f64) {
    for columns in [1, 2, 15, 16, 17, 255, 256, 257, 790, 1000] {
        let rows = 2;
        let count = rows * columns;
        let x: Vec<f64> = noise(1, count).into_iter().map(data).collect();
        let first: Vec<f64> = noise(2, count).iter().map(|u| spread * (2.0 * u - 1.0)).collect();
        let second: Vec<f64> = noise(3, count).iter().map(|u| 4.0 * u - 2.0).collect();
        let operands = whole(&x, &first, &second, columns);
        let grad = [2.0, -0.5];
        for level in available() {
            for (row, ours) in totals::<D>(level, operands, rows, 1).into_iter().enumerate() {
                let elements = row * columns..(row + 1) * columns;
                let terms: Vec<f64> = elements.map(|i| truth(x[i], first[i], second[i])).collect();
                let (total, size): (f64, f64) = (terms.iter().sum(), terms.iter().map(|t| t.abs()).sum());
                assert!((ours - total).abs() < 1e-13 * (size + 1.0), "{level:?} {columns}: {ours}, not {total}");
            }
            let (d_first, d_second) = slopes::<D>(level, operands, &grad, 1);
            for i in 0..count {
                let (grad, step) = (grad[i / columns], 1e-5);
                let due = grad * (truth(x[i], first[i] + step, second[i]) - truth(x[i], first[i] - step, second[i]));
                let error = (d_first[i] - due / (2.0 * step)).abs();
                assert!(
                    error < 1e-6 * (1.0 + d_first[i].abs()),
                    "{level:?} {columns}: first {}, {error:e}",
                    d_first[i]
                );
                let due = grad * (truth(x[i], first[i], second[i] + step) - truth(x[i], first[i], second[i] - step));
                let error = (d_second[i] - due / (2.0 * step)).abs();
                assert!(
                    error < 1e-6 * (1.0 + d_second[i].abs()),
                    "{level:?} {columns}: second {}, {error:e}",
                    d_second[i]
                );
            }
        }
    }
}

#[test]
fn gaussian_is_its_formula() {
    against::<Gaussian>(gaussian, |u| 3.0 * u, 2.0);
}

#[test]
fn continuous_bernoulli_is_its_formula() {
    against::<ContinuousBernoulli>(continuous_bernoulli, |u| u, 6.0);
}

#[test]
fn poisson_is_its_formula() {
    against::<Poisson>(poisson, |u| (30.0 * u).floor(), 3.0);
}

#[test]
fn negative_binomial_is_its_formula() {
    against::<NegativeBinomial>(negative_binomial, |u| (30.0 * u).floor(), 3.0);
}

/// S = 3 samples of N = 4 examples: x is one row an example, the second parameter one row, one number or per sample.
#[test]
fn rows_meet_their_own() {
    let (samples, examples, columns) = (3, 4, 300);
    let rows = samples * examples;
    let x: Vec<f64> = noise(1, examples * columns).iter().map(|u| (9.0 * u).floor()).collect();
    let first = noise(2, rows * columns);
    for (second, width) in [(1, columns), (1, 1), (examples, columns), (examples, 1), (rows, 1), (rows, columns)] {
        let numbers = noise(3, second * width);
        let operands = Operands {
            x: operand(&x, columns),
            first: operand(&first, columns),
            second: operand(&numbers, width),
            columns,
        };
        let grad = noise(4, rows);
        let repeat = |i: usize| numbers[(i / columns % second) * width + if width == 1 { 0 } else { i % columns }];
        let (all_x, all_second): (Vec<f64>, Vec<f64>) =
            (0..rows * columns).map(|i| (x[i % x.len()], repeat(i))).unzip();
        let repeated = whole(&all_x, &first, &all_second, columns);
        for level in available() {
            assert_eq!(
                totals::<NegativeBinomial>(level, operands, rows, 1),
                totals::<NegativeBinomial>(level, repeated, rows, 1)
            );
            assert_eq!(totals::<Gaussian>(level, operands, rows, 1), totals::<Gaussian>(level, repeated, rows, 1));
            let (ours, repeated) =
                (slopes::<Gaussian>(level, operands, &grad, 1), slopes::<Gaussian>(level, repeated, &grad, 1));
            assert_eq!(ours.0, repeated.0);
            for (at, ours) in ours.1.iter().enumerate() {
                let due: f64 =
                    if width == 1 { repeated.1[at * columns..(at + 1) * columns].iter().sum() } else { repeated.1[at] };
                assert!((ours - due).abs() <= 1e-12 * (1.0 + due.abs()));
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let (rows, columns) = (60, 3001);
    let x: Vec<f64> = noise(1, 20 * columns).iter().map(|u| (50.0 * u).floor()).collect();
    let (first, second, grad) = (noise(2, rows * columns), noise(3, columns), noise(4, rows));
    let run = |threads| {
        let operands = Operands {
            x: operand(&x, columns),
            first: operand(&first, columns),
            second: operand(&second, columns),
            columns,
        };
        let level = crate::simd::level();
        (
            totals::<NegativeBinomial>(level, operands, rows, threads),
            slopes::<NegativeBinomial>(level, operands, &grad, threads),
        )
    };
    let alone = run(1);
    for threads in [2, 3, 64] {
        assert!(run(threads) == alone, "{threads} threads");
    }
}

#[test]
fn element_types_agree_on_numbers_they_all_hold() {
    let columns = 301;
    let x: Vec<f64> = (0..columns).map(|i| (i % 7) as f64).collect();
    let first: Vec<f64> = (0..2 * columns).map(|i| ((i * 37) % 61) as f64 / 16.0 - 2.0).collect();
    let singles: Vec<f32> = first.iter().map(|&v| v as f32).collect();
    let (halves, brains): (Vec<f16>, Vec<bf16>) = first.iter().map(|&v| (f16::from_f64(v), bf16::from_f64(v))).unzip();
    let (bytes, counts): (Vec<u8>, Vec<i64>) = x.iter().map(|&v| (v as u8, v as i64)).unzip();
    let run = |x, first| {
        let operands = Operands {
            x: Operand { numbers: x, width: columns },
            first: Operand { numbers: first, width: columns },
            second: Operand::NONE,
            columns,
        };
        let mut out = [f32::NAN; 2];
        log_prob::<Poisson>(operands, NumbersMut::F32(&mut out), 1).unwrap();
        let (mut half, mut brain) = (vec![f16::NAN; 2 * columns], vec![bf16::NAN; 2 * columns]);
        let grad = Numbers::F32(&[1.0, 2.0]);
        gradients::<Poisson>(operands, grad, Some(NumbersMut::F16(&mut half)), None, 1).unwrap();
        gradients::<Poisson>(operands, grad, Some(NumbersMut::Bf16(&mut brain)), None, 1).unwrap();
        for (i, (half, brain)) in half.iter().zip(&brain).enumerate() {
            let due = (1 + i / columns) as f64 * (((i % columns) % 7) as f64 - self::poisson_rate(i));
            assert!((half.to_f64() - due).abs() <= 1e-3 * due.abs().max(1e-3), "{half} {due}");
            assert!((brain.to_f64() - due).abs() <= 8e-3 * due.abs().max(1e-3), "{brain} {due}");
        }
        out
    };
    let truth = run(Numbers::F64(&x), Numbers::F64(&first));
    for first in [Numbers::F32(&singles), Numbers::F16(&halves), Numbers::Bf16(&brains)] {
        for x in [Numbers::U8(&bytes), Numbers::I64(&counts), Numbers::F64(&x)] {
            assert_eq!(run(x, first), truth);
        }
    }
}

/// The rate of element i above.
fn poisson_rate(i: usize) -> f64 {
    (((i * 37) % 61) as f64 / 16.0 - 2.0).exp()
}

#[test]
fn infinities_are_certainties() {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    let value = |density: fn(Level, Operands, usize, usize) -> Vec<f64>, x: f64, first: f64, second: f64| {
        let levels = available().into_iter().map(|level| {
            // in the tail, and in a whole group
            let (mut xs, mut firsts, mut seconds) = ([0.0; 19], [-inf; 19], [0.0; 19]);
            let at = 18;
            (xs[at], firsts[at], seconds[at]) = (x, first, second);
            let parameters = (&xs[at..], &firsts[at..], &seconds[at..]);
            density(level, whole(parameters.0, parameters.1, parameters.2, 1), 1, 1)[0]
        });
        let values: Vec<f64> = levels.collect();
        assert!(values.iter().all(|v| v.to_bits() == values[0].to_bits() || (v.is_nan() && values[0].is_nan())));
        values[0]
    };
    for (x, log_rate, due) in [
        (0.0, -inf, 0.0),
        (3.0, -inf, -inf),
        (0.0, inf, -inf),
        (3.0, inf, -inf),
        (-1.0, 1.0, -inf),
        (-1.0, -inf, -inf),
        (inf, 1.0, -inf),
    ] {
        assert_eq!(value(totals::<Poisson>, x, log_rate, 0.0), due, "Poisson {x} {log_rate}");
    }
    for (x, log_mu, log_theta, due) in [
        (0.0, -inf, 0.0, 0.0),
        (0.0, -inf, inf, 0.0),
        (2.0, -inf, 0.0, -inf),
        (2.0, inf, 0.0, -inf),
        (0.0, inf, 0.0, -inf),
        (2.0, 0.0, -inf, -inf),
        (-2.0, 0.0, 1.0, -inf),
        (inf, 0.0, 1.0, -inf),
    ] {
        assert_eq!(value(totals::<NegativeBinomial>, x, log_mu, log_theta), due, "NB {x} {log_mu} {log_theta}");
    }
    assert!(value(totals::<NegativeBinomial>, 0.0, 1.0, -inf).abs() < 1e-40);
    for (x, logit, due) in [(1.0, inf, inf), (0.5, inf, -inf), (0.0, -inf, inf), (0.1, -inf, -inf)] {
        assert_eq!(value(totals::<ContinuousBernoulli>, x, logit, 0.0), due, "{x} {logit}");
    }
    for (x, mean, log_sigma, due) in [
        (1.0, 1.0, -inf, inf),
        (1.0, 2.0, -inf, -inf),
        (1.0, inf, 0.0, -inf),
        (1.0, 2.0, inf, -inf),
        (1.0, 2.0, -800.0, -inf),
    ] {
        assert_eq!(value(totals::<Gaussian>, x, mean, log_sigma), due, "{x} {mean} {log_sigma}");
    }
    for (x, first, second) in [(nan, 0.0, 0.0), (1.0, nan, 0.0), (1.0, 0.0, nan), (0.0, nan, 0.0), (0.0, 0.0, nan)] {
        assert!(value(totals::<Gaussian>, x, first, second).is_nan(), "Gaussian {x} {first} {second}");
        assert!(value(totals::<NegativeBinomial>, x, first, second).is_nan(), "NB {x} {first} {second}");
        if !second.is_nan() {
            assert!(value(totals::<Poisson>, x, first, 0.0).is_nan(), "Poisson {x} {first}");
            assert!(value(totals::<ContinuousBernoulli>, x, first, 0.0).is_nan(), "CB {x} {first}");
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_errors_and_nothing_is_zero() {
    let numbers = [1.0; 12];
    let mut out = [7.0; 3];
    for (x, second, width) in [(8, 12, 4), (3, 12, 4), (0, 12, 4), (12, 8, 4), (12, 2, 1), (12, 3, 3)] {
        let operands = Operands {
            x: operand(&numbers[..x], 4),
            first: operand(&numbers, 4),
            second: operand(&numbers[..second], width),
            columns: 4,
        };
        assert!(log_prob::<Gaussian>(operands, NumbersMut::F64(&mut out), 1).is_err(), "{x} {second} {width}");
    }
    let fitting = whole(&numbers, &numbers, &numbers, 4);
    let short = Some(NumbersMut::F64(&mut []));
    assert!(gradients::<Gaussian>(fitting, Numbers::F64(&numbers[..3]), short, None, 1).is_err());
    log_prob::<Gaussian>(whole(&[], &[], &[], 0), NumbersMut::F64(&mut out), 2).unwrap();
    assert_eq!(out, [0.0; 3]);
    log_prob::<Gaussian>(whole(&[], &[], &[], 4), NumbersMut::F64(&mut []), 2).unwrap();
    gradients::<Gaussian>(whole(&[], &[], &[], 0), Numbers::F64(&numbers[..3]), None, None, 2).unwrap();
}
