//! Every level and shape against float64, infinite logits, threads, bad classes.

#![allow(clippy::float_cmp)]

use half::{bf16, f16};

use super::*;
use crate::simd::available;
use crate::values::Values;

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

fn forward<S: Logits>(level: Level, logits: S, x: Classes, shape: Shape, rows: usize, threads: usize) -> Vec<f64> {
    let mut out = vec![f64::NAN; rows];
    categorical_log_prob_at(level, logits, x, shape, NumbersMut::F64(&mut out), threads).unwrap();
    out
}

fn backward<S: Logits>(level: Level, logits: S, x: Classes, shape: Shape, grad: &[f64], threads: usize) -> Vec<f64> {
    let mut out = vec![f64::NAN; logits.len()];
    let target = NumbersMut::F64(&mut out);
    categorical_log_prob_backward_at(level, logits, x, shape, Numbers::F64(grad), target, threads).unwrap();
    out
}

/// Log-probabilities of every class of a position.
fn logs(logits: &[f64], shape: Shape, row: usize, at: usize) -> Vec<f64> {
    let first = row * shape.classes * shape.positions + at;
    let values: Vec<f64> = (0..shape.classes).map(|c| logits[first + c * shape.positions]).collect();
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let others: f64 = values.iter().map(|v| (v - most).exp()).sum::<f64>() - 1.0;
    values.iter().map(|v| v - most - others.ln_1p()).collect()
}

#[test]
fn values_and_slopes_are_those_of_float64_for_every_shape() {
    for (classes, positions) in
        [(1, 1), (2, 1), (10, 1), (300, 1), (3, 2), (5, 15), (4, 16), (7, 31), (256, 40), (3, 600)]
    {
        let (shape, rows) = (Shape { classes, positions }, 4);
        let logits: Vec<f32> = noise(5, rows * classes * positions).iter().map(|l| 12.0 * l).collect();
        let wide: Vec<f64> = logits.iter().map(|&l| l.into()).collect();
        // two rows of x for four of logits
        let x: Vec<i64> = (0..2 * positions).map(|i| (i * 7 % classes) as i64).collect();
        let grad = [1.0, -2.0, 0.5, 3.0];
        for level in available() {
            let (single, double) = (Values::F32(&logits), wide.as_slice());
            let (values, exact) = (
                forward(level, single, Classes::I64(&x), shape, rows, 1),
                forward(level, double, Classes::I64(&x), shape, rows, 1),
            );
            let (slopes, exact_slopes) = (
                backward(level, single, Classes::I64(&x), shape, &grad, 1),
                backward(level, double, Classes::I64(&x), shape, &grad, 1),
            );
            for row in 0..rows {
                let mut total = 0.0;
                for at in 0..positions {
                    let logs = logs(&wide, shape, row, at);
                    let chosen = x[(row * positions + at) % x.len()] as usize;
                    total += logs[chosen];
                    for (class, log) in logs.iter().enumerate() {
                        let due = grad[row] * (f64::from(class == chosen) - log.exp());
                        let index = (row * classes + class) * positions + at;
                        assert!(
                            (slopes[index] - due).abs() < 2e-6 * (due.abs() + 1e-9),
                            "{level:?} {} {due}",
                            slopes[index]
                        );
                        assert!((exact_slopes[index] - due).abs() < 1e-13 * (due.abs() + 1e-2), "{level:?} {due}");
                    }
                }
                assert!(
                    (values[row] - total).abs() <= 1e-6 * total.abs(),
                    "{level:?} {shape:?}: {} {total}",
                    values[row]
                );
                assert!((exact[row] - total).abs() <= 2e-14 * (1.0 + total.abs()), "{level:?}: {} {total}", exact[row]);
            }
        }
    }
}

#[test]
fn infinite_logits_are_certainties() {
    let inf = f32::INFINITY;
    for positions in [1, 20] {
        let shape = Shape { classes: 3, positions };
        for (row, x, due, slopes) in [
            ([-inf, 1.0, 1.0], 1, -std::f64::consts::LN_2, [0.0, 0.5, -0.5]),
            ([-inf, 1.0, 1.0], 0, f64::NEG_INFINITY, [1.0, -0.5, -0.5]),
            ([inf, 1.0, 2.0], 0, 0.0, [0.0, 0.0, 0.0]),
            ([inf, 1.0, -inf], 1, f64::NEG_INFINITY, [-1.0, 1.0, 0.0]),
        ] {
            let mut logits = vec![0.0; 3 * positions];
            for class in 0..3 {
                logits[class * positions + positions - 1] = row[class];
            }
            let mut classes = vec![0_u8; positions];
            classes[positions - 1] = x;
            for level in available() {
                let values = Values::F32(&logits);
                let ours = forward(level, values, Classes::U8(&classes), shape, 1, 1)[0];
                let others = -(positions as f64 - 1.0) * 3f64.ln();
                assert!(ours == due || (ours - due - others).abs() < 1e-5, "{level:?} {row:?} {x}: {ours}");
                let ours = backward(level, values, Classes::U8(&classes), shape, &[1.0], 1);
                for class in 0..3 {
                    assert!((ours[class * positions + positions - 1] - slopes[class]).abs() < 1e-6, "{ours:?}");
                }
            }
        }
        for bad in [-inf, f32::NAN] {
            let logits = vec![bad; 3 * positions];
            for level in available() {
                assert!(
                    forward(level, Values::F32(&logits), Classes::U8(&vec![0; positions]), shape, 1, 1)[0].is_nan()
                );
            }
        }
    }
}

#[test]
fn threads_change_no_bit_and_types_agree() {
    let (shape, rows) = (Shape { classes: 9, positions: 700 }, 40);
    let logits: Vec<f32> = (0..rows * 6300).map(|i| ((i * 37) % 61) as f32 / 4.0 - 7.0).collect();
    let (halves, brains): (Vec<f16>, Vec<bf16>) = logits.iter().map(|&v| (f16::from_f32(v), bf16::from_f32(v))).unzip();
    let bytes: Vec<u8> = (0..700).map(|i| (i % 9) as u8).collect();
    let longs: Vec<i64> = bytes.iter().map(|&b| b.into()).collect();
    let grad = vec![1.5; rows];
    let level = crate::simd::level();
    let run = |logits: Values, x: Classes, threads| {
        (forward(level, logits, x, shape, rows, threads), backward(level, logits, x, shape, &grad, threads))
    };
    let alone = run(Values::F32(&logits), Classes::U8(&bytes), 1);
    for (logits, x, threads) in [
        (Values::F32(&logits), Classes::I64(&longs), 2),
        (Values::F16(&halves), Classes::U8(&bytes), 3),
        (Values::Bf16(&brains), Classes::U8(&bytes), 64),
    ] {
        assert!(run(logits, x, threads) == alone, "{threads} threads");
    }
}

#[test]
fn bad_classes_and_lengths_are_errors() {
    let (logits, mut out) = ([0.0_f32; 12], [7.0; 2]);
    let (values, shape) = (Values::F32(&logits), Shape { classes: 3, positions: 2 });
    for bad in [-1, 3, 300, i64::MIN] {
        let x = [0, 1, bad, 2];
        let error = categorical_log_prob(values, Classes::I64(&x), shape, NumbersMut::F64(&mut out), 1).unwrap_err();
        assert!(error.to_string().contains(&format!("x holds {bad}, expected classes from 0 to 2")), "{error}");
    }
    assert!(categorical_log_prob(values, Classes::U8(&[0, 3]), shape, NumbersMut::F64(&mut out), 1).is_err());
    assert!(categorical_log_prob(values, Classes::U8(&[0]), shape, NumbersMut::F64(&mut out), 1).is_err());
    let short = NumbersMut::F64(&mut []);
    let grad = Numbers::F64(&[1.0; 2]);
    assert!(categorical_log_prob_backward(values, Classes::U8(&[0; 4]), shape, grad, short, 1).is_err());
    let none = Shape { classes: 3, positions: 0 };
    categorical_log_prob(Values::F32(&[]), Classes::U8(&[]), none, NumbersMut::F64(&mut out), 1).unwrap();
    assert_eq!(out, [0.0; 2]);
}
