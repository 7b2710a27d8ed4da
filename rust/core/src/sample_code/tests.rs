//! The rule, in float64, on every level; and that panels passed over could not have won.

use super::*;
use crate::nearest_code::Metric;
use crate::simd::available;

fn values(seed: u32, count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (gumbel(philox(u64::from(seed), [i, 0, 0, 0])[0]) - 0.5) * 0.7).collect()
}

#[test]
fn the_winner_has_the_largest_score_with_its_noise() {
    let (rows, codes, dims, heads) = (40, 333, 5, 2);
    let shape = Shape { heads, rows, codes, dims };
    let (x, codebook) = (values(1, heads * rows * dims), values(2, heads * codes * dims));
    let row_ids: Vec<i64> = (0..rows as i64).map(|row| (row - 7) << 29).collect();
    let key = 0x1234_5678_9ABC_DEF0;
    for temperature in [1e-3_f32, 0.1, 1.0, 100.0] {
        let scoring = Scoring { metric: Metric::Euclidean, inverse_temperature: 1.0 / temperature };
        let mut bias = vec![0.0; heads * codes];
        bias[3] = f32::NEG_INFINITY;
        for level in available() {
            for threads in [1, 3] {
                let mut out = vec![-1; heads * rows];
                let noise = Noise { key, row_ids: &row_ids };
                sample_code_at(level, &x, &codebook, &bias, shape, scoring, noise, &mut out, threads).unwrap();
                for (place, &found) in out.iter().enumerate() {
                    let (head, row) = (place / rows, place % rows);
                    let x = &x[place * dims..][..dims];
                    let id = row_ids[row];
                    let total = |k: usize| {
                        let code = &codebook[(head * codes + k) * dims..][..dims];
                        let square: f64 = x.iter().zip(code).map(|(&x, &e)| f64::from(x - e).powi(2)).sum();
                        let counter = [(k / 4) as u32, head as u32, id as u32, (id >> 32) as u32];
                        let noise = f64::from(gumbel(philox(key, counter)[k % 4]));
                        noise - square.sqrt() / f64::from(temperature) + f64::from(bias[head * codes + k])
                    };
                    let best = (0..codes).map(total).fold(f64::NEG_INFINITY, f64::max);
                    let slack = 2e-6 * (10.0 + 3.0 / f64::from(temperature));
                    assert!(total(found as usize) >= best - slack, "{level:?}: {found} of row {row}");
                }
            }
        }
    }
}

#[test]
fn a_row_without_codes_gets_the_first() {
    let shape = Shape { heads: 1, rows: 1, codes: 2, dims: 1 };
    let scoring = Scoring { metric: Metric::Dot, inverse_temperature: 1.0 };
    let mut out = [-1];
    let noise = Noise { key: 0, row_ids: &[0] };
    sample_code(&[1.0], &[1.0, 2.0], &[f32::NEG_INFINITY; 2], shape, scoring, noise, &mut out, 1).unwrap();
    assert_eq!(out, [0]);
    assert!(sample_code(&[1.0], &[1.0, 2.0], &[0.0; 1], shape, scoring, noise, &mut out, 1).is_err());
    let none = Noise { key: 0, row_ids: &[] };
    assert!(sample_code(&[1.0], &[1.0, 2.0], &[0.0; 2], shape, scoring, none, &mut out, 1).is_err());
}
