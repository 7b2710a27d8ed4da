use super::*;
use crate::nearest_code::tests::{METRICS, noise};
use crate::nearest_code::{Shape, exact, nearest_code_at};
use crate::simd;

/// Every metric and level, with threads, against the definition.
fn check(x: &[f32], codebook: &[f32], dims: usize) {
    let (rows, codes) = (x.len() / dims, codebook.len() / dims);
    for metric in METRICS {
        let expected: Vec<i64> = x
            .chunks(dims)
            .map(|x| {
                let score = |k: usize| exact::scores(metric, x, [&codebook[k * dims..][..dims]])[0];
                (1..codes).fold((0, score(0)), |best, k| if score(k) < best.1 { (k, score(k)) } else { best }).0 as i64
            })
            .collect();
        for level in simd::available() {
            for threads in [1, 2, 3] {
                let mut out = vec![i64::MIN; rows];
                let shape = Shape { heads: 1, rows, codes, dims, count: 1 };
                nearest_code_at(level, x, codebook, shape, metric, &mut out, threads).unwrap();
                assert_eq!(out, expected, "{metric:?} {} {threads} threads {rows} {codes} {dims}", level.name());
            }
        }
    }
}

#[test]
fn both_sides_of_the_crossover() {
    for dims in [1, 5, 8, 31, 64] {
        let last = (1..200).filter(|&rows| pays((rows, 1), 301, dims)).max().unwrap();
        for rows in [1, 2, 3, 13, last, last + 1] {
            check(&noise(rows * dims, 1, 1.0, 0.0), &noise(301 * dims, 2, 1.0, 0.0), dims);
        }
    }
    assert!(pays((75, 1), 1024, 128) && !pays((75, 1), 255, 128) && !pays((75, 2), 1024, 128));
}

#[test]
fn hard_numbers() {
    let dims = 24;
    for (scale, offset) in
        [(1.0, 1000.0), (1e-5, 0.0), (1e-5, 1e-2), (1e-20, 0.0), (1e-40, 0.0), (1e17, 0.0), (1e37, 0.0)]
    {
        let mut codebook = noise(300 * dims, 3, scale, offset);
        codebook.copy_within(..100 * dims, 200 * dims);
        let mut x = noise(40 * dims, 4, scale, offset);
        x[..5 * dims].copy_from_slice(&codebook[210 * dims..215 * dims]);
        check(&x, &codebook, dims);
        // Two clusters: no centre is of use.
        codebook.iter_mut().chain(&mut x).step_by(2).for_each(|value| *value -= 2.0 * offset);
        let half = 150 * dims;
        codebook[half..].iter_mut().for_each(|value| *value += 2.0 * offset);
        check(&x, &codebook, dims);
    }
    check(&noise(20 * dims, 5, 1.0, 0.0), &vec![0.5; 300 * dims], dims);
    check(&noise(20 * dims, 5, 1.0, 0.0), &vec![0.0; 300 * dims], dims);
}

#[test]
fn what_is_not_finite() {
    let dims = 9;
    let (mut x, mut codebook) = (noise(20 * dims, 6, 1.0, 0.0), noise(290 * dims, 7, 1.0, 0.0));
    (x[3], x[dims], x[2 * dims + 1]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    (codebook[0], codebook[289 * dims]) = (f32::NAN, f32::NAN);
    check(&x, &codebook, dims);
    codebook[70 * dims + 2] = f32::INFINITY;
    check(&x, &codebook, dims);
    codebook[71 * dims + 2] = f32::MAX;
    check(&x, &codebook, dims);
    check(&x, &vec![f32::NAN; 300 * dims], dims);
}

#[test]
fn threads_share_the_codes() {
    let (rows, codes, dims) = (64, 2304, 256);
    let mut codebook = noise(codes * dims, 8, 1.0, 0.0);
    codebook.copy_within(..1152 * dims, 1152 * dims);
    let x = noise(rows * dims, 9, 1.0, 0.0);
    let find = |threads| {
        let mut out = vec![-1; rows];
        assert!(search(simd::level(), Metric::Euclidean, &codebook, &x, dims, &mut out, threads));
        out
    };
    let mut expected = vec![-1; rows];
    for (x, out) in x.chunks(dims).zip(&mut expected) {
        exact::nearest_of(Metric::Euclidean, x, &codebook, 0..codes, std::slice::from_mut(out));
    }
    assert!(expected.iter().all(|&k| k < 1152));
    assert_eq!([find(1), find(2), find(3)], [&expected[..]; 3]);
}

#[test]
fn what_float32_cannot_order_is_given_back() {
    let good = noise(300 * 4, 10, 1.0, 0.0);
    let fits = |metric, at: usize, value: f32| {
        let mut codebook = good.clone();
        codebook[4 * at..4 * at + 4].fill(value);
        search(simd::level(), metric, &codebook, &[1.0; 4], 4, &mut [0], 1)
    };
    for metric in METRICS {
        assert!(fits(metric, 299, 0.0) && fits(metric, 299, f32::NAN));
        assert!(!fits(metric, 299, 1e30));
    }
    assert!(!fits(Metric::Cosine, 7, 1e-12) && fits(Metric::Euclidean, 7, 1e-12));
    assert!(!fits(Metric::Dot, 7, f32::INFINITY) && fits(Metric::Euclidean, 7, f32::INFINITY));
    assert!(!search(simd::level(), Metric::Dot, &[f32::NAN; 8], &[1.0; 4], 4, &mut [0], 1));
}

#[test]
fn the_error_bound_holds() {
    for (seed, dims) in [1, 2, 3, 7, 16, 33, 70, 300].into_iter().enumerate() {
        for (metric, offset) in METRICS.into_iter().flat_map(|metric| [(metric, 0.0), (metric, 30.0)]) {
            let codebook = noise(8 * dims, seed as u64, 1.0, offset);
            let x = noise(2 * dims, seed as u64 + 50, 2.0, offset);
            let codes = Codes::new(metric, &codebook, dims);
            let rows = Rows::new(x.chunks_exact(dims), &codes.row_centre(), most_rows(Level::Portable));
            let mut panel = Panel::new::<Portable>(&codes);
            let mut scores = Scores([[0.0; 8]; 2]);
            // SAFETY: portable vectors need no instruction set.
            unsafe {
                assert!(panel.pack::<Portable>(&codes, 0).is_ok());
                rows.score::<Portable>(&panel, 0, &mut scores);
            }
            let bound = Bound::of_panels(metric, &codes.centre, panel.square, panel.factor);
            let half = if metric.is_euclidean() { 0.5 } else { 1.0 };
            for (row, x) in x.chunks(dims).enumerate() {
                let error = bound.error(rows.norms[row]);
                let truth = |k: usize| half * exact::scores(metric, x, [&codebook[k * dims..][..dims]])[0];
                for k in 1..8 {
                    // Of differences, in which what all codes have in common cancels.
                    let fast = f64::from(scores.0[row][k]) - f64::from(scores.0[row][0]);
                    assert!((fast - (truth(k) - truth(0))).abs() <= 2.0 * error, "{metric:?} {dims} {offset}");
                }
            }
        }
    }
}

/// All scores of two rows against one panel.
struct Scores([[f32; 8]; 2]);

impl rows::Sink<Portable> for Scores {
    unsafe fn take(&mut self, row: usize, number: usize, scores: Portable) {
        // SAFETY: two vectors of four lanes.
        unsafe { crate::nearest_code::vector::Vector::store(scores, self.0[row].as_mut_ptr().add(4 * number)) };
    }
}
