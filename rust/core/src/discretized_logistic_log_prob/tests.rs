//! Every level against float64, ends of the range, thread counts.

#![allow(clippy::float_cmp)]

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

/// The levels of a row, edges among them.
fn on_levels(seed: u32, count: usize, levels: usize) -> Vec<f32> {
    let top = levels as f32 - 1.0;
    noise(seed, count)
        .iter()
        .map(|x| (2.0 * ((x * 1.2 + 1.0) * top / 2.0).round().clamp(0.0, top) - top) / top)
        .collect()
}

fn row(level: Level, x: &[f32], mean: &[f32], log_scale: &[f32], levels: usize) -> f32 {
    let mut out = [f32::NAN];
    let (x, mean, log_scale) = (Values::F32(x), Values::F32(mean), Values::F32(log_scale));
    let data = Logistics { x, mean, log_scale, levels, columns: mean.len() };
    discretized_logistic_log_prob_at(level, data, &mut out, 1).unwrap();
    out[0]
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

#[test]
fn relative_error_is_small_on_every_level() {
    for levels in [2, 7, 256, 65536] {
        for columns in [1, 2, 15, 16, 17, 31, 33, 63, 351, 352, 353, 790, 3072, 196_608] {
            for (spread, shift) in [(0.02, -7.0), (0.3, -3.0), (1.0, -1.0), (5.0, 3.0), (0.01, -12.0)] {
                let x = on_levels(columns as u32, columns, levels);
                let mean: Vec<f32> = x.iter().zip(noise(3, columns)).map(|(x, e)| x + spread * e).collect();
                let log_scale: Vec<f32> = noise(5, columns).iter().map(|e| shift + e).collect();
                let (x64, mean64, log_scale64) = (wide(&x), wide(&mean), wide(&log_scale));
                let data = Logistics64 { x: &x64, mean: &mean64, log_scale: &log_scale64, levels, columns };
                let mut truth = [f64::NAN];
                discretized_logistic_log_prob_f64(data, &mut truth, 1).unwrap();
                for level in available() {
                    let ours = f64::from(row(level, &x, &mean, &log_scale, levels));
                    let error = (ours - truth[0]).abs() / truth[0].abs().max(1e-8);
                    assert!(error < 2e-6, "{level:?} {levels} {columns} {shift}: {ours}, not {}: {error:e}", truth[0]);
                }
            }
        }
    }
}

#[test]
fn equal_numbers_do_not_overflow() {
    // The largest factors: a wide level centred on the mean, or one of width 1.
    for level in available() {
        for log_scale in [0.0, -4.844, -7.0, 5.0] {
            for columns in [352, 3072, 196_608] {
                let x = vec![1.0 / 255.0; columns];
                let ours = f64::from(row(level, &x, &x, &vec![log_scale; columns], 256));
                let one = f64::from(row(level, &x[..1], &x[..1], &[log_scale], 256));
                assert!((ours / (one * columns as f64) - 1.0).abs() < 2e-6, "{level:?} {log_scale} {columns}: {ours}");
            }
        }
    }
}

#[test]
fn infinite_parameters_are_certainties_wherever_they_stand() {
    let (inf, columns) = (f32::INFINITY, 391);
    for level in available() {
        let (mut x, mut mean, mut log_scale) = (on_levels(1, columns, 256), noise(2, columns), vec![-2.0; columns]);
        for at in [0, 380, 390] {
            let rest: Vec<Vec<f32>> =
                [&x, &mean, &log_scale].map(|v| [&v[..at], &v[at + 1..]].concat()).into_iter().collect();
            let without = row(level, &rest[0], &rest[1], &rest[2], 256);
            let kept = (x[at], mean[at], log_scale[at]);
            let one = 1.0 / 255.0;
            for (value, m, s, certain) in [
                (-1.0, -inf, 0.0, true),
                (1.0, inf, 0.0, true),
                (-1.0, inf, 0.0, false),
                (1.0, -inf, 0.0, false),
                (one, inf, 0.0, false),
                (one, one, -inf, true),
                (one, 0.5, inf, false),
            ] {
                (x[at], mean[at], log_scale[at]) = (value, m, s);
                let ours = row(level, &x, &mean, &log_scale, 256);
                let close = if certain { (ours / without - 1.0).abs() < 1e-6 } else { ours == -inf };
                assert!(close, "{level:?}: {value} {m} {s} at {at}: {ours}, without it {without}");
            }
            (x[at], mean[at], log_scale[at]) = kept;
        }
    }
}

#[test]
fn nan_spoils_its_own_row_only() {
    let columns = 37;
    for level in available() {
        for which in 0..3 {
            for at in [0, 20, 36] {
                let mut values = [on_levels(1, 3 * columns, 256), noise(2, 3 * columns), noise(3, 3 * columns)];
                values[which][columns + at] = f32::NAN;
                let [x, mean, log_scale] = values.each_ref().map(|v| Values::F32(v));
                let data = Logistics { x, mean, log_scale, levels: 256, columns };
                let mut out = [0.0; 3];
                discretized_logistic_log_prob_at(level, data, &mut out, 1).unwrap();
                assert_eq!(out.map(f32::is_nan), [false, true, false], "{level:?} {which} {at}");
            }
        }
    }
}

#[test]
fn gradients_are_accurate_on_every_level_and_thread_count() {
    for columns in [1, 15, 16, 17, 790, 1000] {
        for (spread, shift) in [(0.02, -7.0), (0.3, -3.0), (1.0, 0.0), (5.0, 3.0)] {
            let x = on_levels(columns as u32, columns, 256);
            let mean: Vec<f32> =
                noise(3, 200 * columns).iter().enumerate().map(|(i, e)| x[i % columns] + spread * e).collect();
            let log_scale: Vec<f32> = noise(5, 200 * columns).iter().map(|e| shift + e).collect();
            let grad: Vec<f32> = noise(6, 200).iter().map(|e| 2.0 + e).collect();
            let (x64, mean64, log_scale64, grad64) = (wide(&x), wide(&mean), wide(&log_scale), wide(&grad));
            let data = Logistics64 { x: &x64, mean: &mean64, log_scale: &log_scale64, levels: 256, columns };
            let (mut d_mean, mut d_log_scale) = (vec![f64::NAN; mean.len()], vec![f64::NAN; mean.len()]);
            discretized_logistic_log_prob_backward_f64(data, &grad64, [&mut d_mean, &mut d_log_scale], 3).unwrap();
            let (x, mean, log_scale) = (Values::F32(&x), Values::F32(&mean), Values::F32(&log_scale));
            let data = Logistics { x, mean, log_scale, levels: 256, columns };
            for level in available() {
                let mut before = None;
                for threads in [1, 3] {
                    let (mut mean, mut log_scale) = (vec![f32::NAN; d_mean.len()], vec![f32::NAN; d_mean.len()]);
                    let out = [ValuesMut::F32(&mut mean), ValuesMut::F32(&mut log_scale)];
                    discretized_logistic_log_prob_backward_at(level, data, &grad, out, threads).unwrap();
                    for (index, (&ours, &truth)) in mean.iter().zip(&d_mean).enumerate() {
                        let rate = (-log_scale64[index]).exp();
                        assert!(
                            (f64::from(ours) - truth).abs() < 3e-6 * rate,
                            "{level:?} {shift}: {ours}, not {truth}"
                        );
                    }
                    for (&ours, truth) in log_scale.iter().zip(&d_log_scale) {
                        let error = (f64::from(ours) - truth).abs();
                        assert!(error < 3e-6 * truth.abs().max(1.0), "{level:?} {shift}: {ours}, not {truth}");
                    }
                    let results = (mean, log_scale);
                    assert!(before.is_none_or(|before| before == results), "{level:?}: {threads} threads");
                    before = Some(results);
                }
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let (rows, columns) = (97, 3001);
    let (x, mean, log_scale) = (on_levels(1, columns, 256), noise(5, rows * columns), noise(6, rows * columns));
    let (x64, mean64, log_scale64) = (wide(&x), wide(&mean), wide(&log_scale));
    let single = Logistics {
        x: Values::F32(&x),
        mean: Values::F32(&mean),
        log_scale: Values::F32(&log_scale),
        levels: 256,
        columns,
    };
    let double = Logistics64 { x: &x64, mean: &mean64, log_scale: &log_scale64, levels: 256, columns };
    let run = |threads| {
        let (mut out, mut out64) = (vec![0.0; rows], vec![0.0; rows]);
        discretized_logistic_log_prob(single, &mut out, threads).unwrap();
        discretized_logistic_log_prob_f64(double, &mut out64, threads).unwrap();
        (out, out64)
    };
    let alone = run(1);
    for threads in [2, 3, 64] {
        assert!(run(threads) == alone, "{threads} threads");
    }
}

#[test]
fn lengths_that_do_not_fit_are_errors_and_nothing_is_zero() {
    let values = [1.0; 12];
    let all = Values::F32(&values);
    let mut out = [7.0; 3];
    let data = Logistics { x: all, mean: all, log_scale: all, levels: 256, columns: 4 };
    for wrong in [
        Logistics { x: Values::F32(&values[..8]), ..data },
        Logistics { x: Values::F32(&values[..0]), ..data },
        Logistics { log_scale: Values::F32(&values[..8]), ..data },
        Logistics { columns: 5, ..data },
        Logistics { levels: 1, ..data },
    ] {
        assert!(discretized_logistic_log_prob(wrong, &mut out, 1).is_err());
    }
    let short = [ValuesMut::F32(&mut []), ValuesMut::F32(&mut [])];
    assert!(discretized_logistic_log_prob_backward(data, &[1.0; 3], short, 1).is_err());
    let none = Values::F32(&[]);
    let nothing = Logistics { x: none, mean: none, log_scale: none, levels: 256, columns: 0 };
    discretized_logistic_log_prob(nothing, &mut out, 2).unwrap();
    assert_eq!(out, [0.0; 3]);
    discretized_logistic_log_prob(Logistics { columns: 4, ..nothing }, &mut [], 2).unwrap();
}
