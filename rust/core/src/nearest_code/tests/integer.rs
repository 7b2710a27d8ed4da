//! The fast pass in integers: its bound, its range, and when it is given up.

use super::super::codebook::Prepared;
use super::super::integer::{self, IntegerCodes};
use super::super::pairs::Vnni;
use super::super::passes::IntegerPass;
use super::super::scan::SPAN;
use super::super::search::{self, Head};
use super::super::vector::{Avx512, Vector};
use super::*;
use crate::simd::Level;

const WIDTH: usize = SPAN * Vnni::LANES;

/// The two integers of every pair.
fn unpaired(pairs: impl Iterator<Item = i32>) -> Vec<i64> {
    pairs.flat_map(|pair| [i64::from(pair as i16), i64::from(pair >> 16)]).collect()
}

fn dot(a: &[i64], b: &[i64]) -> i64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Of a tile of rows, alone in their chunk: scores fit 32 bits however large they are, and their differences are those
/// of the true ones within the margin.
fn assert_bound(metric: Metric, x: &[f32], codebook: &[f32], dims: usize) {
    let prepared = Prepared::new(metric, codebook, dims, 8).unwrap();
    // One dimension leaves equal codes of the cosine.
    let Some(codes) = IntegerCodes::new::<8>(&prepared) else {
        assert!(prepared.codes.iter().all(|&value| value == 0.0), "only equal codes have no integers");
        return;
    };
    let steps = dims.div_ceil(2);
    let mut tile = vec![f32::NAN; dims * WIDTH];
    let mut pairs = vec![0; steps * WIDTH];
    // SAFETY: the caller saw that the level is there.
    let (norms, scale, lost) = unsafe {
        let norms = prepared.pack::<Avx512>(x, &mut tile);
        let scale = codes.row_scale(norms.iter().copied().fold(0.0, f64::max));
        (norms, scale, integer::round::<Vnni>(&tile, dims, scale, &mut pairs))
    };
    let errors = prepared.errors(&norms);
    let mut bias = vec![0; prepared.bias.len()];
    codes.bias(&prepared.bias, scale, &mut bias);
    let code = |k: usize| unpaired((0..steps).map(|step| codes.codes[(k / 8 * steps + step) * 8 + k % 8]));
    let integer_codes: Vec<Vec<i64>> = (0..codebook.len() / dims).map(code).collect();
    let unit = f64::from(scale) * f64::from(codes.scale);
    for (lane, x) in x.chunks(dims).enumerate() {
        let row = unpaired((0..steps).map(|step| pairs[step * WIDTH + lane]));
        assert!(dot(&row, &row) <= 32767 * 32767);
        let margin = codes.margin(scale, norms[lane], lost[lane], errors[lane]);
        assert!(margin < 1 << 30, "{metric:?}: the row fits");
        let truth = prepared.truth(x, codebook);
        let score = |k: usize| i64::from(bias[k]) + dot(&row, &integer_codes[k]);
        for k in 0..integer_codes.len() {
            assert!(dot(&integer_codes[k], &integer_codes[k]) <= 32767 * 32767);
            assert!(i32::try_from(score(k)).is_ok_and(|score| score < i32::MAX - 127), "below padding");
            let difference = (score(k) - score(0)) as f64 - unit * (truth[k] - truth[0]);
            assert!(difference.abs() <= margin as f64, "{metric:?} D {dims}: {difference} of {margin}");
        }
    }
}

fn is_here() -> bool {
    simd::detected() == Level::Avx512
}

#[test]
fn extremes_stay_in_range_and_within_the_bound() {
    if !is_here() {
        return;
    }
    for dims in [1, 2, 3, 64, 1001] {
        let codebook = noise(40 * dims, 20, 1.0, 0.0);
        // Parallel to a code and against it, far away, one element only, halfway between integers, alternating.
        let mut x = codebook[..2 * dims].to_vec();
        x.extend(codebook[..dims].iter().map(|value| -value));
        x.extend(codebook[..dims].iter().map(|value| value * 1e6));
        x.extend((0..dims).map(|d| if d == 0 { 1e6 } else { 0.0 }));
        x.extend((0..dims).map(|d| if d % 2 == 0 { 0.5 } else { -0.5 }));
        for metric in METRICS {
            for x in [&x[..2 * dims], &x[..3 * dims], &x[2 * dims..4 * dims], &x[4 * dims..]] {
                assert_bound(metric, x, &codebook, dims);
            }
        }
    }
    // The largest scores there are: all weight on one code, and rows that are it and its opposite.
    let mut codebook = vec![0.0; 16 * 6];
    codebook[..6].fill(1.0);
    assert_bound(Metric::Euclidean, &[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0], &codebook, 6);
}

#[test]
fn group_numbers_of_a_large_codebook_are_shared() {
    // More groups than a score has bits for their numbers.
    let shape = shape(70, 17_000, 2);
    check(&noise(70 * 2, 21, 1.0, 0.0), &noise(17_000 * 2, 22, 1.0, 0.0), shape);
    check(&noise(70 * 2, 21, 1e-3, 7.0), &noise(17_000 * 2, 22, 1.0, 7.0), shape);
}

/// Whether the pass in integers was given up on a search of these rows; it is right in any case.
fn gives_up(x: &[f32], codebook: &[f32], dims: usize) -> bool {
    let rows = x.len() / dims;
    let head = Head::new(Level::Avx512, Metric::SquaredEuclidean, codebook, dims, (rows, 1));
    let prepared = head.prepared.as_ref().unwrap();
    let mut pass = IntegerPass::<Vnni>::new(prepared.integers.as_ref());
    let mut out = vec![-1; rows];
    // SAFETY: the caller saw that the level is there.
    unsafe { search::search_with::<Avx512, 8>(&head, prepared, x, 1, &mut out, &mut pass) };
    assert_eq!(out, brute_force(Metric::SquaredEuclidean, x, codebook, shape(rows, codebook.len() / dims, dims)));
    pass.codes.is_none()
}

#[test]
fn integers_are_given_up_where_they_decide_little() {
    if !is_here() {
        return;
    }
    let (rows, codes, dims) = (300, 260, 12);
    let (x, codebook) = (noise(rows * dims, 23, 1.0, 0.0), noise(codes * dims, 24, 1.0, 0.0));
    assert!(!gives_up(&x, &codebook, dims));
    // A few rows far away cost the others nothing.
    let mut far = x.clone();
    far.chunks_mut(dims).step_by(30).for_each(|row| row.iter_mut().for_each(|value| *value *= 1e4));
    assert!(!gives_up(&far, &codebook, dims));
    // Norms over orders of magnitude; one huge code; every code several times.
    let mut spread = x.clone();
    for (n, row) in spread.chunks_mut(dims).enumerate() {
        let factor = 10.0_f32.powi((n % 5) as i32 * 2 - 4);
        for value in row {
            *value *= factor;
        }
    }
    assert!(gives_up(&spread, &codebook, dims));
    let mut huge = codebook.clone();
    huge[17 * dims] = 1e6;
    assert!(gives_up(&x, &huge, dims));
    assert!(gives_up(&x, &codebook[..40 * dims].repeat(6), dims));
}

#[test]
fn zeros_equal_rows_and_silence() {
    let codebook = noise(100 * 7, 25, 1.0, 0.0);
    let mut x = noise(90 * 7, 26, 1.0, 0.0);
    x[10 * 7..80 * 7].fill(0.0);
    check(&x, &codebook, shape(90, 100, 7));
    check(&codebook[..7].repeat(70), &codebook, shape(70, 100, 7));
    check(&[0.0; 70 * 7], &codebook, shape(70, 100, 7));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn integer_scores_are_within_the_bound(
        seed in 0_u64..1000, dims in 1_usize..70, offset in -100.0_f32..100.0, spread in 0.01_f32..10.0,
    ) {
        if is_here() {
            let codebook = noise(50 * dims, seed, spread, offset);
            let x = noise(8 * dims, seed + 1, 1.0, offset);
            for metric in METRICS {
                assert_bound(metric, &x, &codebook, dims);
            }
        }
    }

    /// As many rows as integers are used for: ties, offsets and scales, all levels.
    #[test]
    fn many_rows_are_the_brute_force_ones(
        seed in 0_u64..1000, codes in 1_usize..140, dims in 1_usize..40,
        offset in prop::sample::select(vec![0.0_f32, 100.0]), scale in prop::sample::select(vec![1.0_f32, 1e-5, 1e-30, 1e12]),
        steps in prop::sample::select(vec![0.0_f32, 1.0, 30.0]),
    ) {
        let make = |count, seed| {
            let round = |value: f32| if steps == 0.0 { value } else { (value * steps).round() / steps };
            noise(count, seed, 2.0, 0.0).into_iter().map(|value| (round(value) + offset) * scale).collect::<Vec<_>>()
        };
        check(&make(130 * dims, seed), &make(codes * dims, seed + 1), shape(130, codes, dims));
    }
}
