//! Every level against float64: all metrics, sizes off the tile, offsets, thread counts, codes left out.

#![allow(clippy::float_cmp)]

use super::*;
use crate::simd::available;

const SIZES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (3, 17, 3), (7, 64, 8), (13, 1000, 5), (5, 65, 63), (300, 130, 2)];
const METRICS: [Metric; 3] = [Metric::Euclidean, Metric::SquaredEuclidean, Metric::Dot];

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

fn distance(metric: Metric, x: &[f32], code: &[f32]) -> f64 {
    let pairs = || x.iter().zip(code).map(|(&x, &e)| (f64::from(x), f64::from(e)));
    let square: f64 = pairs().map(|(x, e)| (x - e) * (x - e)).sum();
    match metric {
        Metric::Euclidean => square.sqrt(),
        Metric::SquaredEuclidean => square,
        Metric::Dot | Metric::Cosine => -pairs().map(|(x, e)| x * e).sum::<f64>(),
    }
}

/// The row's scores and the log of the sum of their exponentials.
fn truth(scoring: Scoring, x: &[f32], codebook: &[f32], bias: &[f32]) -> (Vec<f64>, f64) {
    let score = |(code, &bias): (&[f32], &f32)| {
        f64::from(bias) - distance(scoring.metric, x, code) * f64::from(scoring.inverse_temperature)
    };
    let scores: Vec<f64> = codebook.chunks_exact(x.len()).zip(bias).map(score).collect();
    let sum: f64 = scores.iter().map(|score| score.exp()).sum();
    (scores, sum.ln())
}

#[test]
fn logs_and_probabilities_are_those_of_float64() {
    for level in available() {
        for (rows, codes, dims) in SIZES {
            for (metric, offset) in METRICS.into_iter().zip([100.0, 100.0, 0.0]) {
                let shift = |values: Vec<f32>| values.into_iter().map(|v| v + offset).collect::<Vec<f32>>();
                let (mut x, codebook) = (shift(noise(3, rows * dims)), shift(noise(5, codes * dims)));
                x[..dims].copy_from_slice(&codebook[..dims]);
                let mut bias = vec![0.0; codes];
                bias[codes / 2] = if codes > 1 { f32::NEG_INFINITY } else { 0.0 };
                let (shape, scoring) =
                    (Shape { heads: 1, rows, codes, dims }, Scoring { metric, inverse_temperature: 2.5 });
                let mut lse = vec![f32::NAN; rows];
                code_logsumexp_at(level, &x, &codebook, &bias, shape, scoring, &mut lse, 3).unwrap();
                let mut probabilities = vec![f32::NAN; rows * codes];
                let mut slopes = if metric == Metric::Euclidean { probabilities.clone() } else { vec![] };
                let out = (&mut probabilities, &mut slopes);
                code_probabilities_at(level, &x, &codebook, &bias, &lse, shape, scoring, out.0, out.1, 2).unwrap();
                for row in 0..rows {
                    let x = &x[row * dims..][..dims];
                    let (scores, log) = truth(scoring, x, &codebook, &bias);
                    assert!(
                        (f64::from(lse[row]) - log).abs() < 2e-5 + 5e-7 * log.abs(),
                        "{level:?} {metric:?}: {} {log}",
                        lse[row]
                    );
                    for (k, score) in scores.into_iter().enumerate() {
                        let (p, at) = ((score - log).exp(), row * codes + k);
                        let allowed = 2e-5 + 5e-7 * score.abs().max(log.abs());
                        assert!(
                            (f64::from(probabilities[at]) - p).abs() < allowed * (p + 1e-9),
                            "{level:?} {metric:?}"
                        );
                        let far = distance(metric, x, &codebook[k * dims..][..dims]);
                        if !slopes.is_empty() {
                            let slope = if far == 0.0 { 0.0 } else { p / far };
                            assert!(
                                (f64::from(slopes[at]) - slope).abs() < (1e-5 + allowed) * (slope + 1e-9),
                                "{level:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn no_code_left_is_minus_infinity_and_no_probability() {
    let shape = Shape { heads: 2, rows: 2, codes: 3, dims: 1 };
    let scoring = Scoring { metric: Metric::Euclidean, inverse_temperature: 1.0 };
    let bias = [f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, f32::NEG_INFINITY];
    for level in available() {
        let mut lse = [f32::NAN; 4];
        code_logsumexp_at(level, &[1.0; 4], &[0.5; 6], &bias, shape, scoring, &mut lse, 1).unwrap();
        assert_eq!(lse, [f32::NEG_INFINITY, f32::NEG_INFINITY, -0.5, -0.5]);
        let one = Shape { heads: 1, ..shape };
        let (mut p, mut slopes) = ([f32::NAN; 6], [f32::NAN; 6]);
        let lse = [f32::NEG_INFINITY, f32::NAN];
        code_probabilities_at(level, &[1.0; 2], &[0.5; 3], &bias[..3], &lse, one, scoring, &mut p, &mut slopes, 1)
            .unwrap();
        assert_eq!((p, slopes), ([0.0; 6], [0.0; 6]));
    }
}

#[test]
fn threads_change_no_bit() {
    let (x, codebook) = (noise(1, 900 * 3), noise(2, 1500 * 3));
    let shape = Shape { heads: 1, rows: 900, codes: 1500, dims: 3 };
    let scoring = Scoring { metric: Metric::Euclidean, inverse_temperature: 1.0 };
    let run = |threads| {
        let mut out = vec![0.0; 900];
        code_logsumexp(&x, &codebook, &[0.0; 1500], shape, scoring, &mut out, threads).unwrap();
        out
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let shape = Shape { heads: 1, rows: 2, codes: 3, dims: 1 };
    let scoring = Scoring { metric: Metric::Dot, inverse_temperature: 1.0 };
    assert!(code_logsumexp(&[0.0; 2], &[0.0; 3], &[0.0; 2], shape, scoring, &mut [0.0; 2], 1).is_err());
    assert!(code_logsumexp(&[0.0; 2], &[0.0; 3], &[0.0; 3], shape, scoring, &mut [0.0; 1], 1).is_err());
    let (mut p, mut slopes) = ([0.0; 6], [0.0; 6]);
    let run = code_probabilities(&[0.0; 2], &[0.0; 3], &[0.0; 3], &[0.0; 2], shape, scoring, &mut p, &mut slopes, 1);
    assert!(run.is_err());
}
