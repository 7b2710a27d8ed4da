use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::simd;

/// What everything is compared with: one row after the other, in `f64`.
fn truth<X: Element>(x: &[X], indices: &[i64], weights: Option<&[f64]>, shape: Shape) -> (Vec<f64>, Vec<f64>) {
    let mut sums = vec![0.0; shape.heads * shape.codes * shape.dims];
    let mut counts = vec![0.0; shape.heads * shape.codes];
    for (row, &index) in indices.iter().enumerate() {
        let values = &x[row * shape.dims..(row + 1) * shape.dims];
        let weight = weights.map_or(1.0, |weights| weights[row]);
        if index < 0 || !weight.is_finite() || values.iter().any(|value| !value.double().is_finite()) {
            continue;
        }
        let code = row / shape.rows * shape.codes + index as usize;
        counts[code] += weight;
        for (d, value) in values.iter().enumerate() {
            sums[code * shape.dims + d] += weight * value.double();
        }
    }
    (sums, counts)
}

/// The way that suits the shape, or another.
#[derive(Debug, Clone, Copy)]
enum Way {
    Suited,
    Sorted,
    Streamed,
}

const WAYS: [Way; 3] = [Way::Suited, Way::Sorted, Way::Streamed];

fn run<X: Element>(
    way: Way,
    level: Level,
    x: &[X],
    indices: &[i64],
    weights: Option<&[f64]>,
    shape: Shape,
    threads: usize,
) -> (Vec<f64>, Vec<f64>) {
    let mut sums = vec![0.0; shape.heads * shape.codes * shape.dims];
    let mut counts = vec![0.0; shape.heads * shape.codes];
    let (to_sums, to_counts) = (&mut sums[..], &mut counts[..]);
    let given = Given { x, indices, weights, shape };
    match way {
        Way::Suited => code_sums_at(level, x, indices, weights, shape, to_sums, to_counts, threads).unwrap(),
        Way::Sorted => sorted::add(level, given, false, to_sums, to_counts, threads),
        Way::Streamed => streamed::add(level, given, to_sums, to_counts, threads),
    }
    (sums, counts)
}

fn close(ours: &[f64], truth: &[f64]) {
    for (ours, truth) in ours.iter().zip(truth) {
        assert!((ours - truth).abs() <= 1e-9 * truth.abs().max(1.0), "{ours} is not {truth}");
    }
}

fn random(count: usize, seed: u64) -> impl Iterator<Item = f64> {
    (0..count as u64).map(move |i| {
        let mixed = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(seed).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        ((mixed ^ mixed >> 31).wrapping_mul(0x94D0_49BB_1331_11EB) >> 11) as f64 / (1_u64 << 53) as f64
    })
}

#[test]
fn rows_join_their_codes_at_every_level_and_thread_count() {
    for (heads, rows, codes, dims) in
        [(1, 5000, 7, 64), (2, 3000, 1, 3), (3, 1500, 400, 85), (1, 40000, 2000, 1), (2, 300, 5000, 9)]
    {
        let shape = Shape { heads, rows, codes, dims };
        let x: Vec<f32> = random(heads * rows * dims, 1).map(|v| v as f32 - 0.5).collect();
        let indices: Vec<i64> = random(heads * rows, 2).map(|v| (v * (codes + 1) as f64) as i64 - 1).collect();
        let weights: Vec<f64> = random(heads * rows, 3).collect();
        for weights in [None, Some(&weights[..])] {
            let (sums, counts) = truth(&x, &indices, weights, shape);
            for way in WAYS {
                let first = run(way, Level::Portable, &x, &indices, weights, shape, 1);
                close(&first.0, &sums);
                close(&first.1, &counts);
                for (level, threads) in simd::available().into_iter().flat_map(|l| [1, 2, 5, 64].map(|t| (l, t))) {
                    let other = run(way, level, &x, &indices, weights, shape, threads);
                    assert!(other == first, "{way:?}, {level:?}, {threads}");
                }
            }
        }
    }
}

#[test]
fn rows_in_runs_of_a_code_sum_like_the_truth() {
    for dims in [3, 8, 20, 64, 100] {
        let shape = Shape { heads: 2, rows: 2601, codes: 3, dims };
        let x: Vec<f32> = random(2 * 2601 * dims, 1).map(|v| v as f32 - 0.5).collect();
        let weights: Vec<f64> = random(2 * 2601, 3).collect();
        // Runs of 700, one code's with another between; some in several chunks, some rows left over.
        let indices: Vec<i64> = (0..2 * 2601).map(|row| [2, 0, -1, 2, 1, 1, 0, 0][row / 700]).collect();
        assert!(in_runs(&indices));
        for weights in [None, Some(&weights[..])] {
            let (sums, counts) = truth(&x, &indices, weights, shape);
            let first = run(Way::Suited, Level::Portable, &x, &indices, weights, shape, 1);
            close(&first.0, &sums);
            close(&first.1, &counts);
            for (level, threads) in simd::available().into_iter().flat_map(|l| [1, 5].map(|t| (l, t))) {
                let other = run(Way::Sorted, level, &x, &indices, weights, shape, threads);
                assert!(other == first, "{dims}, {level:?}, {threads}");
            }
        }
    }
}

#[test]
fn a_row_with_a_number_that_is_not_finite_is_skipped() {
    let shape = Shape { heads: 1, rows: 2500, codes: 2, dims: 20 };
    let mut x: Vec<f32> = random(2500 * 20, 1).map(|v| v as f32).collect();
    let indices: Vec<i64> = (0..2500).map(|row| i64::from(row > 10)).collect();
    let mut weights = vec![1.0; 2500];
    x[3 * 20 + 19] = f32::NAN;
    x[1000 * 20] = f32::INFINITY;
    x[1001 * 20] = f32::NEG_INFINITY;
    weights[1000] = 0.0;
    weights[5] = f64::NAN;
    weights[2000] = f64::INFINITY;
    for weights in [None, Some(&weights[..])] {
        let (sums, counts) = truth(&x, &indices, weights, shape);
        for way in WAYS {
            let ours = run(way, simd::level(), &x, &indices, weights, shape, 2);
            close(&ours.0, &sums);
            assert_eq!(ours.1, counts);
        }
    }
}

#[test]
fn halves_and_doubles_are_read_as_they_are() {
    let shape = Shape { heads: 1, rows: 100, codes: 3, dims: 21 };
    let x: Vec<f64> = random(2100, 4).map(|v| v * 8.0 - 4.0).collect();
    let indices: Vec<i64> = (0..100).map(|row| row % 3).collect();
    let halves: Vec<f16> = x.iter().map(|&v| f16::from_f64(v)).collect();
    let brains: Vec<bf16> = x.iter().map(|&v| bf16::from_f64(v)).collect();
    for (level, way) in simd::available().into_iter().flat_map(|level| WAYS.map(|way| (level, way))) {
        close(&run(way, level, &x, &indices, None, shape, 1).0, &truth(&x, &indices, None, shape).0);
        close(&run(way, level, &halves, &indices, None, shape, 1).0, &truth(&halves, &indices, None, shape).0);
        close(&run(way, level, &brains, &indices, None, shape, 1).0, &truth(&brains, &indices, None, shape).0);
    }
}

#[test]
fn nothing_to_sum_is_zero() {
    for (rows, dims) in [(0, 4), (3, 0), (3, 4)] {
        let shape = Shape { heads: 2, rows, codes: 5, dims };
        let x = vec![1.0_f32; 2 * rows * dims];
        for way in WAYS {
            let (sums, counts) = run(way, simd::level(), &x, &vec![-1; 2 * rows], None, shape, 2);
            assert!(sums.iter().chain(&counts).all(|v| v.to_bits() == 0));
        }
    }
    let shape = Shape { heads: 1, rows: 2000, codes: 1, dims: 0 };
    for way in WAYS {
        assert_eq!(run::<f32>(way, simd::level(), &[], &[0; 2000], None, shape, 2).1, [2000.0]);
    }
}

#[test]
fn what_cannot_be_is_an_error() {
    let shape = Shape { heads: 2, rows: 2, codes: 3, dims: 1 };
    let x = [0.0_f32; 4];
    let (mut sums, mut counts) = (vec![0.0; 6], vec![0.0; 6]);
    for (indices, message) in [
        ([0, 0, 3, 0], "indices hold 3 in row 0 of head 1, expected -1 to 2"),
        ([0, -2, 0, 0], "indices hold -2 in row 1 of head 0, expected -1 to 2"),
        ([0, 0, 0, i64::MIN], "row 1 of head 1"),
    ] {
        let error = code_sums(&x, &indices, None, shape, &mut sums, &mut counts, 1).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let short = code_sums(&x[1..], &[0; 4], None, shape, &mut sums, &mut counts, 1);
    assert!(short.unwrap_err().to_string().starts_with("code_sums: x, indices"));
}

proptest! {
    #[test]
    fn any_assignment_sums_like_the_truth(
        indices in prop::collection::vec(-1_i64..6, 0..4000),
        dims in 1_usize..6,
        threads in 1_usize..5,
        hot in any::<bool>(),
    ) {
        let indices: Vec<i64> = indices.into_iter().map(|index| if hot { index.min(0) } else { index }).collect();
        let shape = Shape { heads: 1, rows: indices.len(), codes: 6, dims };
        let x: Vec<f32> = random(indices.len() * dims, 9).map(|v| v as f32).collect();
        let (sums, counts) = truth(&x, &indices, None, shape);
        for way in WAYS {
            let ours = run(way, simd::level(), &x, &indices, None, shape, threads);
            close(&ours.0, &sums);
            prop_assert_eq!(&ours.1, &counts);
        }
    }
}
