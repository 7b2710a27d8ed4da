#[cfg(target_arch = "x86_64")]
mod integer;

use half::bf16;
use proptest::prelude::*;

use super::codebook::Prepared;
use super::scan::SPAN;
use super::vector::{Portable, Vector};
use super::*;

pub(super) const METRICS: [Metric; 4] = [Metric::Euclidean, Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot];

/// Values of a linear congruential generator, roughly normal, times `scale` plus `offset`.
pub(super) fn noise(count: usize, seed: u64, scale: f32, offset: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.7 * scale + offset).collect()
}

/// The definition, written as plainly as it can be.
fn brute_force(metric: Metric, x: &[f32], codebook: &[f32], shape: Shape) -> Vec<i64> {
    let Shape { rows, codes, dims, count, .. } = shape;
    let mut found = Vec::new();
    for (row, x) in x.chunks(dims).enumerate() {
        let mut scores: Vec<(f64, usize)> = (0..codes)
            .map(|k| {
                let code = &codebook[(row / rows * codes + k) * dims..][..dims];
                let (mut euclidean, mut dot, mut square) = (0.0, 0.0, 0.0);
                for d in 0..dims {
                    let (x, e) = (f64::from(x[d]), f64::from(code[d]));
                    euclidean += (x - e) * (x - e);
                    dot -= x * e;
                    square += e * e;
                }
                let score = match metric {
                    Metric::Euclidean | Metric::SquaredEuclidean => euclidean,
                    Metric::Dot => dot,
                    Metric::Cosine => dot / if square == 0.0 { 1.0 } else { square.sqrt() },
                };
                (if score.is_nan() { f64::INFINITY } else { score }, k)
            })
            .collect();
        scores.sort_by(|a, b| a.partial_cmp(b).unwrap());
        found.extend(scores[..count].iter().map(|&(_, k)| k as i64));
    }
    found
}

/// Every level and several thread counts against brute force.
fn check(x: &[f32], codebook: &[f32], shape: Shape) {
    for metric in METRICS {
        let expected = brute_force(metric, x, codebook, shape);
        for level in simd::available() {
            for threads in [1, 3] {
                let mut out = vec![i64::MIN; expected.len()];
                nearest_code_at(level, x, codebook, shape, metric, &mut out, threads).unwrap();
                assert_eq!(out, expected, "{metric:?} {} {threads} threads {shape:?}", level.name());
            }
            // Few rows or many, whichever of the two it would have been.
            for few in [true, false].into_iter().filter(|few| !few || shape.count == 1) {
                let Shape { heads, rows, codes, dims, count } = shape;
                let mut out = vec![i64::MIN; expected.len()];
                for (h, out) in out.chunks_mut(rows * count).enumerate() {
                    let (x, codebook) =
                        (&x[h * rows * dims..][..rows * dims], &codebook[h * codes * dims..][..codes * dims]);
                    let head = Head::of(level, metric, codebook, dims, (rows, count), few);
                    search::search(level, &head, x, count, out, 1);
                }
                assert_eq!(out, expected, "{metric:?} {} few {few} {heads} heads {shape:?}", level.name());
            }
        }
    }
}

fn shape(rows: usize, codes: usize, dims: usize) -> Shape {
    Shape { heads: 1, rows, codes, dims, count: 1 }
}

#[test]
fn odd_shapes_at_every_level() {
    for (rows, codes, dims) in
        [(1, 1, 1), (3, 17, 3), (7, 64, 8), (64, 127, 1), (257, 33, 32), (17, 300, 63), (5, 70, 800)]
    {
        let shape = shape(rows, codes, dims);
        check(&noise(rows * dims, 1, 1.0, 0.0), &noise(codes * dims, 2, 1.0, 0.0), shape);
    }
}

#[test]
fn offsets_scales_and_clusters() {
    let shape = shape(200, 150, 16);
    for (scale, offset) in [(1.0, 1000.0), (1e-5, 0.0), (1e-30, 0.0), (1e-42, 0.0), (1e18, 0.0), (1e37, 0.0)] {
        check(&noise(200 * 16, 3, scale, offset), &noise(150 * 16, 4, scale, offset), shape);
    }
    let mut x = noise(200 * 16, 5, 1.0, 1000.0);
    let mut codebook = noise(150 * 16, 6, 1.0, 1000.0);
    x[1600..].iter_mut().chain(&mut codebook[1600..]).for_each(|value| *value -= 2000.0);
    check(&x, &codebook, shape);
}

#[test]
fn duplicates_and_grids_go_to_the_lowest_index() {
    let mut codebook = noise(50 * 8, 7, 1.0, 0.0);
    codebook.extend(codebook.clone());
    codebook.extend(codebook.clone());
    check(&noise(100 * 8, 8, 1.0, 0.0), &codebook, shape(100, 200, 8));
    let grid = |count, seed| noise(count, seed, 2.0, 0.0).iter().map(|value| value.round()).collect::<Vec<_>>();
    check(&grid(300 * 3, 9), &grid(90 * 3, 10), shape(300, 90, 3));
    check(&noise(30 * 4, 11, 1.0, 0.0), &[0.5; 40 * 4], shape(30, 40, 4));
}

#[test]
fn what_is_not_finite() {
    let (mut x, mut codebook) = (noise(60 * 5, 12, 1.0, 0.0), noise(80 * 5, 13, 1.0, 0.0));
    x[7] = f32::NAN;
    x[23] = f32::INFINITY;
    x[38] = f32::NEG_INFINITY;
    x[50..55].fill(0.0);
    codebook[0] = f32::NAN;
    codebook[66] = f32::NAN;
    codebook[100..105].fill(0.0);
    check(&x, &codebook, shape(60, 80, 5));
    codebook[202] = f32::INFINITY;
    codebook[333] = f32::MAX;
    check(&x, &codebook, shape(60, 80, 5));
    check(&x, &[f32::NAN; 50], shape(60, 10, 5));
}

#[test]
fn several_heads_and_several_results() {
    for count in [1, 2, 40] {
        let shape = Shape { heads: 3, rows: 50, codes: 40, dims: 6, count };
        let grid: Vec<f32> = noise(3 * 40 * 6, 15, 1.0, 0.0).iter().map(|value| value.round()).collect();
        check(&noise(3 * 50 * 6, 14, 1.0, 0.0), &grid, shape);
    }
}

#[test]
fn half_precision_and_double_take_the_values_as_given() {
    let shape = shape(90, 70, 9);
    let x: Vec<bf16> = noise(90 * 9, 16, 1.0, 3.0).into_iter().map(bf16::from_f32).collect();
    let codebook = noise(70 * 9, 17, 1.0, 3.0);
    let wide: Vec<f32> = x.iter().map(|value| value.to_f32()).collect();
    let expected = brute_force(Metric::Euclidean, &wide, &codebook, shape);
    let mut out = vec![-1; 90];
    nearest_code(&x, &codebook, shape, Metric::Euclidean, &mut out, 2).unwrap();
    assert_eq!(out, expected);
    let doubles = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
    nearest_code_f64(&doubles(&wide), &doubles(&codebook), shape, Metric::Euclidean, &mut out, 2).unwrap();
    assert_eq!(out, expected);
}

#[test]
fn distances_are_the_metric() {
    let (x, codebook) = ([3.0_f32, 4.0, f32::NAN, 0.0, 0.0, 0.0], [0.0_f32, 8.0, f32::NAN, 1.0]);
    let shape = Shape { heads: 1, rows: 3, codes: 2, dims: 2, count: 2 };
    let measure = |metric| {
        let mut out = vec![0.0; 6];
        distances(&x, &codebook, &[0, 1, 0, 1, 0, 1], shape, metric, |value| value, &mut out, 2).unwrap();
        assert!(out[2].is_nan() && out[3].is_nan(), "a row with a NaN has distance NaN");
        [out[0], out[1], out[4]].map(f64::to_bits)
    };
    assert_eq!(measure(Metric::Euclidean), [5.0, f64::INFINITY, 8.0].map(f64::to_bits));
    assert_eq!(measure(Metric::SquaredEuclidean), [25.0, f64::INFINITY, 64.0].map(f64::to_bits));
    assert_eq!(measure(Metric::Dot), [-32.0, f64::INFINITY, 0.0].map(f64::to_bits));
    assert_eq!(measure(Metric::Cosine), [1.0 - 0.8, f64::INFINITY, 1.0].map(f64::to_bits));
}

#[test]
fn a_run_of_no_rows_is_searched_at_every_level() {
    let codebook = noise(10 * 3, 18, 1.0, 0.0);
    for level in simd::available() {
        let head = Head::of(level, Metric::Dot, &codebook, 3, (100, 1), false);
        assert!(head.prepared.is_some());
        search::search(level, &head, &[], 1, &mut [], 1);
        search::search(level, &head, &[], 2, &mut [], 1);
        let head = Head::of(level, Metric::Dot, &codebook, 3, (100, 1), true);
        search::search(level, &head, &[], 1, &mut [], 1);
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let mut out = [0; 2];
    assert!(nearest_code(&[0.0_f32; 5], &[0.0; 4], shape(2, 2, 2), Metric::Dot, &mut out, 1).is_err());
    assert!(nearest_code::<f32>(&[0.0; 4], &[], shape(2, 0, 2), Metric::Dot, &mut out, 1).is_err());
    let convert = |value: f64| value;
    assert!(
        distances(&[0.0; 4], &[0.0; 4], &[0, 2], shape(2, 2, 2), Metric::Dot, convert, &mut [0.0; 2], 1).is_err(),
        "an index out of range"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// The error bound holds: a float32 score, unscaled, is never further from the float64 one than it says.
    #[test]
    fn the_error_bound_holds(seed in 0_u64..1000, dims in 1_usize..70, offset in -100.0_f32..100.0, spread in 0.01_f32..10.0) {
        let codebook = noise(64 * dims, seed, spread, offset);
        let x = noise(8 * dims, seed + 1, 1.0, offset);
        for metric in METRICS {
            let prepared = Prepared::new(metric, &codebook, dims, 4).unwrap();
            for x in x.chunks(dims) {
                let mut tile = vec![f32::NAN; dims * SPAN * Portable::LANES];
                // SAFETY: portable vectors need no instruction set.
                let error = prepared.errors(&unsafe { prepared.pack::<Portable>(x, &mut tile) })[0];
                prop_assert!(error.is_finite());
                // Differences between codes, in which the parts common to all codes cancel.
                let scale = prepared.truth(x, &codebook);
                for k in 1..64 {
                    let fast = |k: usize| {
                        let code = |d| prepared.codes[(k / 4 * dims + d) * 4 + k % 4];
                        (0..dims).fold(prepared.bias[k], |sum, d| sum + tile[d * SPAN * Portable::LANES] * code(d))
                    };
                    let difference = f64::from(fast(k)) - f64::from(fast(0));
                    prop_assert!((difference - (scale[k] - scale[0])).abs() <= 2.0 * error);
                }
            }
        }
    }

    /// Grids make ties, offsets and scales make float32 useless: all levels, several results.
    #[test]
    fn any_search_is_the_brute_force_one(
        seed in 0_u64..1000, rows in 1_usize..90, codes in 1_usize..140, dims in 1_usize..150, wanted in 1_usize..40,
        offset in prop::sample::select(vec![0.0_f32, 100.0, 1e5]), scale in prop::sample::select(vec![1.0_f32, 1e-5, 1e-30]),
        round in any::<bool>(),
    ) {
        let make = |count, seed| {
            let values = noise(count, seed, 2.0, 0.0).into_iter();
            values.map(|value| ((if round { value.round() } else { value }) + offset) * scale).collect::<Vec<_>>()
        };
        let shape = Shape { heads: 1, rows, codes, dims, count: if seed % 2 == 0 { 1 } else { wanted.min(codes) } };
        check(&make(rows * dims, seed), &make(codes * dims, seed + 1), shape);
    }
}
