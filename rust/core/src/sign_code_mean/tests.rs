use super::tables::{bit, table_of_row, table_of_rows};
use super::*;
use crate::simd;

/// All 2^bits products of every row, in `f64`.
fn distribution(row: &[f64], slope: f64) -> Vec<f64> {
    let bits = row.len();
    (0..1_usize << bits)
        .map(|code| {
            let sign = |i: usize| if code >> (bits - 1 - i) & 1 == 1 { 1.0 } else { -1.0 };
            (0..bits).map(|i| 1.0 / (1.0 + (-sign(i) * slope * row[i]).exp())).product()
        })
        .collect()
}

fn mean(x: &[f64], bits: usize, slope: f64) -> Vec<f64> {
    let mut total = vec![0.0; 1 << bits];
    for row in x.chunks(bits) {
        for (total, p) in total.iter_mut().zip(distribution(row, slope)) {
            *total += p / (x.len() / bits) as f64;
        }
    }
    total
}

fn random(count: usize, seed: u64) -> Vec<f64> {
    (0..count as u64)
        .map(|i| {
            let mixed = (i + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            ((mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
        })
        .collect()
}

const SIZES: [(usize, usize); 8] = [(1, 1), (5, 2), (33, 3), (129, 5), (1025, 6), (300, 7), (40, 9), (7, 11)];

#[test]
fn means_are_those_of_all_codes() {
    for (rows, bits) in SIZES {
        let x = random(rows * bits, 1);
        let narrow: Vec<f32> = x.iter().map(|&v| v as f32).collect();
        let wide: Vec<f64> = narrow.iter().map(|&v| f64::from(v)).collect();
        let truth = mean(&wide, bits, 3.0);
        for level in simd::available() {
            let (mut single, mut double) = (vec![f32::NAN; 1 << bits], vec![f64::NAN; 1 << bits]);
            for threads in [1, 3] {
                sign_code_mean_at(level, &narrow, bits, 3.0, &mut single, threads).unwrap();
                sign_code_mean_at(level, &wide, bits, 3.0, &mut double, threads).unwrap();
                for ((&single, &double), &truth) in single.iter().zip(&double).zip(&truth) {
                    assert!((f64::from(single) / truth - 1.0).abs() < 2e-6, "{level:?}: {single} is not {truth}");
                    assert!((double / truth - 1.0).abs() < 1e-13, "{level:?}: {double} is not {truth}");
                }
            }
        }
    }
}

/// The derivative of p of a bit is p0 p1 times the derivative of the product in that bit's probability.
fn gradient(x: &[f64], weights: &[f64], bits: usize, slope: f64) -> Vec<f64> {
    let rows = (x.len() / bits) as f64;
    let mut out = Vec::new();
    for row in x.chunks(bits) {
        let all = distribution(row, slope);
        for (i, x) in row.iter().enumerate() {
            let p = 1.0 / (1.0 + (-slope * x).exp());
            let terms = all.iter().zip(weights).enumerate().map(|(code, (q, weight))| {
                let set = code >> (bits - 1 - i) & 1 == 1;
                weight * q * if set { 1.0 - p } else { -p }
            });
            out.push(slope / rows * terms.sum::<f64>());
        }
    }
    out
}

#[test]
fn gradients_are_those_of_all_codes() {
    for (rows, bits) in SIZES {
        let (x, weights) = (random(rows * bits, 1), random(1 << bits, 2));
        let truth = gradient(&x, &weights, bits, 3.0);
        let largest = truth.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
        let narrow: [Vec<f32>; 2] = [&x, &weights].map(|values| values.iter().map(|&v| v as f32).collect());
        for level in simd::available() {
            let (mut single, mut double) = (vec![f32::NAN; x.len()], vec![f64::NAN; x.len()]);
            for threads in [1, 3] {
                sign_code_mean_backward_at(level, &narrow[0], &narrow[1], bits, 3.0, &mut single, threads).unwrap();
                sign_code_mean_backward_at(level, &x, &weights, bits, 3.0, &mut double, threads).unwrap();
                for ((&single, &double), &truth) in single.iter().zip(&double).zip(&truth) {
                    assert!((f64::from(single) - truth).abs() < 3e-6 * largest, "{level:?}: {single} is not {truth}");
                    assert!((double - truth).abs() < 1e-13 * largest, "{level:?}: {double} is not {truth}");
                }
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let (rows, bits) = (2500, 12);
    let x: Vec<f32> = random(rows * bits, 1).into_iter().map(|v| v as f32).collect();
    let weights: Vec<f32> = random(1 << bits, 2).into_iter().map(|v| v as f32).collect();
    for level in simd::available() {
        let results: Vec<_> = [1, 2, 5]
            .map(|threads| {
                let (mut mean, mut slopes) = (vec![0.0; 1 << bits], vec![0.0; x.len()]);
                sign_code_mean_at(level, &x, bits, 2.0, &mut mean, threads).unwrap();
                sign_code_mean_backward_at(level, &x, &weights, bits, 2.0, &mut slopes, threads).unwrap();
                (mean, slopes)
            })
            .into();
        assert!(results[0] == results[1] && results[0] == results[2], "{level:?}");
    }
}

#[test]
#[allow(clippy::float_cmp)]
fn certain_bits_have_one_code_and_no_slope() {
    let x = [f32::INFINITY, f32::NEG_INFINITY, f32::INFINITY];
    let (mut mean, mut slopes) = ([f32::NAN; 8], [f32::NAN; 3]);
    sign_code_mean(&x, 3, 1.0, &mut mean, 1).unwrap();
    assert_eq!(mean, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]);
    sign_code_mean_backward(&x, &[1.0; 8], 3, 1.0, &mut slopes, 1).unwrap();
    assert_eq!(slopes, [0.0; 3]);
}

#[test]
#[allow(clippy::float_cmp)]
fn no_rows_have_no_distribution() {
    let mut mean = [f32::NAN; 4];
    sign_code_mean(&[], 2, 1.0, &mut mean, 2).unwrap();
    assert_eq!(mean, [0.0; 4]);
    sign_code_mean_backward(&[], &[1.0; 4], 2, 1.0, &mut [], 2).unwrap();
}

#[test]
fn sizes_that_do_not_match_are_errors() {
    assert!(sign_code_mean(&[0.0_f32; 4], 0, 1.0, &mut [0.0], 1).is_err());
    assert!(sign_code_mean(&[0.0_f32; 3], 2, 1.0, &mut [0.0; 4], 1).is_err());
    assert!(sign_code_mean(&[0.0_f32; 4], 2, 1.0, &mut [0.0; 3], 1).is_err());
    assert!(sign_code_mean(&[0.0_f32; 19], 19, 1.0, &mut vec![0.0; 1 << 19], 1).is_err());
    assert!(sign_code_mean_backward(&[0.0_f32; 4], &[0.0; 4], 2, 1.0, &mut [0.0; 3], 1).is_err());
}

/// The tables of both layouts, of 32 rows of 5 bits.
struct Tables<'a>(&'a [f32]);

impl simd::Kernel for Tables<'_> {
    type Output = [Vec<f32>; 2];

    fn run<V: simd::Lanes>(self) -> Self::Output {
        let [bits, panel] = [5, 32];
        let (mut single, mut together) = (Vec::new(), vec![0.0; panel << bits]);
        let mut probabilities = vec![0.0; bits * 2 * panel];
        for (row, x) in self.0.chunks(bits).enumerate() {
            let all: Vec<[f32; 2]> = x.iter().map(|&x| bit(x, 1.0)).collect();
            let mut table = vec![0.0; 1 << bits];
            table_of_row(&all, &mut table);
            single.extend(table);
            for (i, [zero, one]) in all.into_iter().enumerate() {
                probabilities[2 * i * panel + row] = zero;
                probabilities[(2 * i + 1) * panel + row] = one;
            }
        }
        table_of_rows::<V>(&probabilities, panel, &mut together);
        let together = (0..panel).flat_map(|row| together.iter().skip(row).step_by(panel).copied()).collect();
        [single, together]
    }
}

#[test]
fn the_product_of_tiny_numbers_is_the_least_normal_one() {
    assert_eq!((f32::TINY * f32::TINY).to_bits(), f32::MIN_POSITIVE.to_bits());
    assert_eq!((f64::TINY * f64::TINY).to_bits(), f64::MIN_POSITIVE.to_bits());
}

#[test]
fn no_product_of_two_probabilities_is_subnormal() {
    for scale in [1.0, 10.0, 30.0, 50.0, 80.0, 200.0] {
        let x: Vec<f32> = random(160, 3).iter().map(|&x| (scale * x) as f32).collect();
        let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let truth: Vec<f64> = wide.chunks(5).flat_map(|row| distribution(row, 1.0)).collect();
        for level in simd::available() {
            for table in simd::run(level, Tables(&x)) {
                for (&found, &truth) in table.iter().zip(&truth) {
                    assert!(found == 0.0 || found * found >= f32::MIN_POSITIVE, "{level:?}: {found}");
                    assert!(
                        (f64::from(found) - truth).abs() <= 1e-6 * truth + 2e-19,
                        "{level:?}: {found} is not {truth}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_nan_is_not_flushed() {
    for level in simd::available() {
        let mut x = vec![1.0_f32; 160];
        x[7] = f32::NAN;
        for table in simd::run(level, Tables(&x)) {
            assert!(table[32..64].iter().all(|p| p.is_nan()) && table[..32].iter().all(|p| p.is_finite()));
        }
    }
}
