//! A search of a few rows, for which preparing the codebook would not pay: it is read once, as it came. Panels of codes
//! are transposed into the cache, scored, and forgotten.
//!
//! Scores are float32 with an error bound, as in the pass over prepared codes; codes that it cannot tell apart are
//! compared in float64.

mod panel;
mod rows;
#[cfg(test)]
mod tests;

use std::ops::Range;

use self::panel::{Panel, Unfit};
use self::rows::{Lane, Rows, Smallest, Within, near};
use super::Metric;
use super::codebook::Bound;
use super::exact;
use super::scan::SPAN;
use super::vector::{Floats, Portable};
use crate::simd::Level;
use crate::threads;

/// Codes whose mean is taken for the centre: any centre is right, a good one makes the error bound small.
const SAMPLE: usize = 16;
/// Multiply-adds that repay another thread.
const GRAIN: usize = 1 << 24;
/// Packing a code costs as much as scoring it for so many rows.
const PACKING: usize = 8;

/// This is the faster search up to so many rows, whose squares grow with D (measured for D = 4 to 256).
const MOST_ROWS: usize = 144;
const SQUARED_ROWS: usize = 200;
/// Of fewer codes the mean is no small part of the work.
const FEWEST_CODES: usize = 256;
/// A panel must stay in the cache.
const MOST_DIMS: usize = 1 << 12;

/// Whether to search so for `count` codes of every row.
pub(super) fn pays((rows, count): (usize, usize), codes: usize, dims: usize) -> bool {
    count == 1 && codes >= FEWEST_CODES && rows <= MOST_ROWS && rows * rows <= SQUARED_ROWS * dims && dims <= MOST_DIMS
}

/// A codebook as it came [K, D], and what is subtracted from codes.
struct Codes<'a> {
    metric: Metric,
    codebook: &'a [f32],
    dims: usize,
    centre: Vec<f32>,
}

impl<'a> Codes<'a> {
    fn new(metric: Metric, codebook: &'a [f32], dims: usize) -> Self {
        let mut codes = Self { metric, codebook, dims, centre: vec![0.0; dims] };
        let size = codes.size();
        let sample = (0..size.min(SAMPLE)).map(|i| &codebook[i * size / size.min(SAMPLE) * dims..][..dims]);
        // The cosine's factors would have to be exact for a centre to be of use.
        let finite = sample.filter(|code| metric != Metric::Cosine && code.iter().all(|value| value.is_finite()));
        let (mut sums, mut count) = (vec![0.0_f64; dims], 0.0);
        for code in finite {
            sums.iter_mut().zip(code).for_each(|(sum, &value)| *sum += f64::from(value));
            count += 1.0;
        }
        if count > 0.0 {
            codes.centre.iter_mut().zip(sums).for_each(|(value, sum)| *value = (sum / count) as f32);
        }
        codes
    }

    fn size(&self) -> usize {
        self.codebook.len() / self.dims
    }

    /// What rows subtract: for the dot product the centre shifts all scores of a row alike.
    fn row_centre(&self) -> Vec<f32> {
        if self.metric.is_euclidean() { self.centre.clone() } else { vec![0.0; self.dims] }
    }
}

/// The nearest code of every row of `x` [n, D] into `out` [n]; false, and nothing is written, where float32 scores
/// cannot be trusted.
pub(super) fn search(
    level: Level,
    metric: Metric,
    codebook: &[f32],
    x: &[f32],
    dims: usize,
    out: &mut [i64],
    threads: usize,
) -> bool {
    let codes = Codes::new(metric, codebook, dims);
    let width = SPAN * lanes(level);
    let panels = codes.size().div_ceil(width);
    let rows = Rows::new(x.chunks_exact(dims), &codes.row_centre(), most_rows(level));
    let grain = GRAIN / ((out.len() + PACKING) * width * dims) + 1;
    let (codes, packed) = (&codes, &rows);
    let tasks = threads::pieces(panels, grain, threads)
        .into_iter()
        .map(|panels| move || run(level, First { codes, rows: packed, panels }))
        .collect();
    let Ok(found): Result<Vec<Found>, Unfit> = threads::run(tasks).into_iter().collect() else { return false };
    let lanes = |row: usize| found.iter().flat_map(move |found| found.row(row)).copied().collect::<Vec<_>>();
    let square = found.iter().map(|found| found.square).fold(0.0, f32::max);
    let factor = found.iter().map(|found| found.factor).fold(0.0, f32::max);
    let bound = Bound::of_panels(metric, &codes.centre, square, factor);
    if !found.iter().any(|found| found.any) {
        return false;
    }
    let mut again = Vec::new();
    let mut limits = Vec::new();
    for (row, (x, slot)) in x.chunks_exact(dims).zip(out.iter_mut()).enumerate() {
        let error = bound.error(rows.norms[row]);
        let decided = std::slice::from_mut(slot);
        if x.iter().any(|value| value.is_nan()) {
            decided[0] = 0;
        } else if !error.is_finite() {
            exact::nearest_of(metric, x, codebook, 0..codes.size(), decided);
        } else {
            match near(&lanes(row), 2.0 * error) {
                Ok(list) if list.len() == 1 => decided[0] = list[0] as i64,
                Ok(list) => exact::nearest_of(metric, x, codebook, list.into_iter(), decided),
                Err(limit) => {
                    again.push(row);
                    limits.push(limit);
                }
            }
        }
    }
    if !again.is_empty() {
        let x = |row: usize| &x[row * dims..][..dims];
        let rows = Rows::new(again.iter().map(|&row| x(row)), &codes.row_centre(), most_rows(level));
        let Ok(lists) = run(level, Second { codes, rows: &rows, limits }) else { return false };
        for (&row, list) in again.iter().zip(lists) {
            let list = list.into_iter().filter(|&k| k < codes.size());
            exact::nearest_of(metric, x(row), codebook, list, &mut out[row..=row]);
        }
    }
    true
}

/// What a scan of some panels found.
struct Found {
    /// [n, LANES].
    lanes: Vec<Lane>,
    rows: usize,
    /// Whether any code was finite.
    any: bool,
    square: f32,
    factor: f32,
}

impl Found {
    fn row(&self, row: usize) -> &[Lane] {
        let width = self.lanes.len() / self.rows;
        &self.lanes[row * width..][..width]
    }
}

/// Something to be compiled for every instruction set.
trait Task {
    type Output;
    /// # Safety
    /// As [`super::vector::Vector`].
    unsafe fn run<T: Floats>(self) -> Self::Output;
}

/// The smallest scores of every row among the codes of some panels.
struct First<'a> {
    codes: &'a Codes<'a>,
    rows: &'a Rows,
    panels: Range<usize>,
}

impl Task for First<'_> {
    type Output = Result<Found, Unfit>;

    #[inline(always)]
    unsafe fn run<T: Floats>(self) -> Result<Found, Unfit> {
        let Self { codes, rows, panels } = self;
        // SAFETY: the caller's promise.
        unsafe {
            let infinite = T::splat(f32::INFINITY);
            let mut smallest = Smallest(vec![[infinite, infinite, T::splat(0.0)]; rows.padded()]);
            let mut panel = Panel::new::<T>(codes);
            for number in panels {
                panel.pack::<T>(codes, number)?;
                rows.score::<T>(&panel, number, &mut smallest);
            }
            let rows = rows.norms.len();
            let mut lanes = Vec::with_capacity(rows * T::LANES);
            (0..rows).for_each(|row| lanes.extend(smallest.lanes(row)));
            Ok(Found { lanes, rows, any: panel.any, square: panel.square, factor: panel.factor })
        }
    }
}

/// All codes of every row whose scores are within its limit.
struct Second<'a> {
    codes: &'a Codes<'a>,
    rows: &'a Rows,
    limits: Vec<f32>,
}

impl Task for Second<'_> {
    type Output = Result<Vec<Vec<usize>>, Unfit>;

    #[inline(always)]
    unsafe fn run<T: Floats>(self) -> Self::Output {
        let Self { codes, rows, mut limits } = self;
        limits.resize(rows.padded(), f32::NEG_INFINITY);
        let mut within = Within { codes: vec![Vec::new(); limits.len()], limits };
        let mut panel = Panel::new::<T>(codes);
        for number in 0..codes.size().div_ceil(SPAN * T::LANES) {
            // SAFETY: the caller's promise.
            unsafe {
                panel.pack::<T>(codes, number)?;
                rows.score::<T>(&panel, number, &mut within);
            }
        }
        Ok(within.codes)
    }
}

/// Lanes of a vector of `level`.
fn lanes(level: Level) -> usize {
    match level {
        Level::Portable => 4,
        Level::Avx2 => 8,
        Level::Avx512F | Level::Avx512 => 16,
    }
}

/// Rows that are scored together: two vectors of sums each, in registers.
fn most_rows(level: Level) -> usize {
    if level >= Level::Avx512F { 12 } else { 6 }
}

fn run<K: Task>(level: Level, task: K) -> K::Output {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx2 => unsafe { run_avx2(task) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx512F | Level::Avx512 => unsafe { run_avx512(task) },
        // SAFETY: portable vectors need no instruction set.
        _ => unsafe { task.run::<Portable>() },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<K: Task>(task: K) -> K::Output {
    // SAFETY: this function enables the instruction set.
    unsafe { task.run::<super::vector::Avx2>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn run_avx512<K: Task>(task: K) -> K::Output {
    // SAFETY: this function enables the instruction set.
    unsafe { task.run::<super::vector::Avx512>() }
}
