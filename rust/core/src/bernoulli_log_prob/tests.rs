//! Every level against float64, ends of the range, thread counts, element types.

#![allow(clippy::float_cmp)]

use half::{bf16, f16};

use super::*;
use crate::simd::available;

/// Numbers in [-1, 1) that look random.
fn noise(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / 2_147_483_648.0 - 1.0
        })
        .collect()
}

/// x l - max(l, 0) - log(1 + exp(-|l|)) term by term.
fn truth(logits: &[f32], x: &[f32]) -> f64 {
    let term = |(&logit, &x): (&f32, &f32)| {
        let (logit, x) = (f64::from(logit), f64::from(x));
        let linear = if logit > 0.0 { (x - 1.0) * logit } else { x * logit };
        linear - (-logit.abs()).exp().ln_1p()
    };
    logits.iter().zip(x).map(term).sum()
}

fn row(level: Level, logits: &[f32], x: &[f32]) -> f32 {
    let mut out = [f32::NAN];
    bernoulli_log_prob_at(level, Values::F32(logits), Values::F32(x), logits.len(), &mut out, 1).unwrap();
    out[0]
}

#[test]
fn relative_error_is_below_2e_6_on_every_level() {
    for level in available() {
        for columns in [1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 100, 784, 790, 959, 960, 961, 3072, 196_608] {
            for scale in [1e-3, 1.0, 5.0, 20.0, 80.0] {
                let logits: Vec<f32> = noise(columns as u32, columns).iter().map(|l| l * scale).collect();
                let values = noise(7, columns);
                let unit: Vec<f32> = values.iter().map(|x| x.abs()).collect();
                let binary: Vec<f32> = values.iter().map(|&x| f32::from(x > 0.0)).collect();
                let confident: Vec<f32> = logits.iter().map(|&l| f32::from(l > 0.0)).collect();
                for x in [unit, binary, confident] {
                    let (ours, truth) = (f64::from(row(level, &logits, &x)), truth(&logits, &x));
                    let error = (ours - truth).abs() / truth.abs().max(1e-36);
                    assert!(error < 2e-6, "{level:?} {columns} x {scale}: {ours}, not {truth}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn equal_logits_do_not_overflow_or_drift() {
    for level in available() {
        for columns in [784, 960, 3072, 196_608] {
            for logit in [0.0, -0.0, 1e-3, -0.7, 3.0, -17.0, 25.0] {
                let (logits, x) = (vec![logit; columns], vec![1.0; columns]);
                let (ours, truth) = (f64::from(row(level, &logits, &x)), truth(&logits, &x));
                assert!((ours / truth - 1.0).abs() < 2e-6, "{level:?} {columns} at {logit}: {ours}, not {truth}");
            }
        }
    }
}

#[test]
fn infinite_logits_are_certainties_wherever_they_stand() {
    let (inf, columns) = (f32::INFINITY, 983);
    for level in available() {
        for at in [0, 500, 970, 982] {
            for (x, logit, certain) in [(0.0, -inf, true), (0.0, inf, false), (1.0, inf, true), (1.0, -inf, false)] {
                let (mut logits, mut data) = (noise(3, columns), vec![1.0; columns]);
                (logits[at], data[at]) = (-1e4, 0.0);
                let without = row(level, &logits, &data);
                (logits[at], data[at]) = (logit, x);
                let expected = if certain { without } else { -inf };
                assert_eq!(row(level, &logits, &data), expected, "{level:?}: x = {x} at {logit}");
                data[at] = 0.5;
                assert_eq!(row(level, &logits, &data), -inf, "{level:?}: x = 0.5 at {logit}");
            }
        }
    }
}

#[test]
fn nan_spoils_its_own_row_only() {
    let columns = 37;
    for level in available() {
        for bad_x in [false, true] {
            for at in [0, 20, 36] {
                let (mut logits, mut x) = (noise(1, 3 * columns), vec![0.0; 3 * columns]);
                let spoiled = if bad_x { &mut x } else { &mut logits };
                spoiled[columns + at] = f32::NAN;
                let mut out = [0.0; 3];
                bernoulli_log_prob_at(level, Values::F32(&logits), Values::F32(&x), columns, &mut out, 1).unwrap();
                assert_eq!(out.map(f32::is_nan), [false, true, false], "{level:?} {bad_x} {at}");
            }
        }
    }
}

#[test]
fn gradients_are_accurate_on_every_level() {
    for level in available() {
        for columns in [1, 15, 16, 17, 790, 1000] {
            let logits: Vec<f32> = noise(9, 2 * columns).iter().map(|l| l * 30.0).collect();
            let x: Vec<f32> = noise(8, columns).iter().map(|&x| f32::from(x > 0.0)).collect();
            let mut out = vec![f32::NAN; 2 * columns];
            let (logits_view, x_view) = (Values::F32(&logits), Values::F32(&x));
            let target = ValuesMut::F32(&mut out);
            bernoulli_log_prob_backward_at(level, logits_view, x_view, &[2.0, -3.0], columns, target, 2).unwrap();
            for (index, (&ours, &logit)) in out.iter().zip(&logits).enumerate() {
                let (grad, x) = ([2.0, -3.0][index / columns], x[index % columns]);
                let factor = (-f64::from(logit).abs()).exp();
                let rest = (factor / (1.0 + factor)).copysign(f64::from(logit));
                let truth = grad * (f64::from(x) - f64::from(u8::from(logit > 0.0)) + rest);
                assert!((f64::from(ours) / truth - 1.0).abs() < 1e-6, "{level:?}: {ours}, not {truth}");
            }
        }
    }
}

#[test]
fn gradients_at_the_ends_are_finite() {
    let inf = f32::INFINITY;
    for level in available() {
        let (logits, x) = ([inf, inf, -inf, -inf, 0.0, -0.0], [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]);
        let mut out = [f32::NAN; 6];
        let target = ValuesMut::F32(&mut out);
        bernoulli_log_prob_backward_at(level, Values::F32(&logits), Values::F32(&x), &[1.0], 6, target, 1).unwrap();
        assert_eq!(out, [-1.0, 0.0, 0.0, 1.0, 0.5, 0.5], "{level:?}");
    }
}

#[test]
fn threads_change_no_bit() {
    let (rows, columns) = (97, 3001);
    let (logits, x) = (noise(5, rows * columns), noise(6, columns));
    let (logits64, x64): (Vec<f64>, Vec<f64>) =
        (logits.iter().map(|&l| l.into()).collect(), x.iter().map(|&x| x.into()).collect());
    let run = |threads| {
        let (mut out, mut out64) = (vec![0.0; rows], vec![0.0; rows]);
        let (mut slopes, mut slopes64) = (vec![0.0; rows * columns], vec![0.0; rows * columns]);
        let (l, v) = (Values::F32(&logits), Values::F32(&x));
        bernoulli_log_prob(l, v, columns, &mut out, threads).unwrap();
        bernoulli_log_prob_backward(l, v, &logits[..rows], columns, ValuesMut::F32(&mut slopes), threads).unwrap();
        bernoulli_log_prob_f64(&logits64, &x64, columns, &mut out64, threads).unwrap();
        bernoulli_log_prob_backward_f64(&logits64, &x64, &logits64[..rows], columns, &mut slopes64, threads).unwrap();
        (out, slopes, out64, slopes64)
    };
    let alone = run(1);
    for (single, double) in alone.0.iter().zip(&alone.2).chain(alone.1.iter().zip(&alone.3)) {
        assert!((f64::from(*single) - double).abs() <= 2e-6 * double.abs() + 1e-6, "{single}, not {double}");
    }
    for threads in [2, 3, 64] {
        assert!(run(threads) == alone, "{threads} threads");
    }
}

#[test]
fn element_types_agree_on_numbers_they_all_hold() {
    let columns = 1003;
    let logits: Vec<f32> = (0..2 * columns).map(|i| ((i * 37) % 61) as f32 / 4.0 - 7.0).collect();
    let x: Vec<f32> = (0..columns).map(|i| f32::from(i % 3 == 0)).collect();
    let (l16, lb): (Vec<_>, Vec<_>) = logits.iter().map(|&l| (f16::from_f32(l), bf16::from_f32(l))).unzip();
    let (x16, xb): (Vec<_>, Vec<_>) = x.iter().map(|&x| (f16::from_f32(x), bf16::from_f32(x))).unzip();
    let bytes: Vec<u8> = x.iter().map(|&x| x as u8).collect();
    let run = |logits: Values, x: Values| {
        let mut out = [f32::NAN; 2];
        bernoulli_log_prob(logits, x, columns, &mut out, 1).unwrap();
        out
    };
    let truth = run(Values::F32(&logits), Values::F32(&x));
    for logits in [Values::F16(&l16), Values::Bf16(&lb)] {
        for x in [Values::F16(&x16), Values::Bf16(&xb), Values::U8(&bytes)] {
            assert_eq!(run(logits, x), truth);
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_errors_and_nothing_is_zero() {
    let values = [1.0; 12];
    let all = Values::F32(&values);
    let mut out = [7.0; 3];
    for (x, columns) in [(&values[..8], 4), (&values[..3], 4), (&values[..0], 4), (&values[..], 5)] {
        assert!(bernoulli_log_prob(all, Values::F32(x), columns, &mut out, 1).is_err());
    }
    let short = ValuesMut::F32(&mut []);
    assert!(bernoulli_log_prob_backward(all, all, &[1.0; 3], 4, short, 1).is_err());
    let none = Values::F32(&[]);
    bernoulli_log_prob(none, none, 0, &mut out, 2).unwrap();
    assert_eq!(out, [0.0; 3]);
    bernoulli_log_prob(none, none, 4, &mut [], 2).unwrap();
    bernoulli_log_prob_backward(none, none, &[1.0; 3], 0, ValuesMut::F32(&mut []), 2).unwrap();
}
