//! Searching a run of rows: the fast pass, its certificate, and float64 for what it leaves undecided.

use super::codebook::Prepared;
use super::scan::{Everything, Smallest, scan};
use super::vector::Vector;
use super::{GROUP, Metric, exact};
use crate::simd::Level;

/// Codes (floats) of a block that stays in the first-level cache while rows pass over it.
const BLOCK: usize = 6 * 1024;
/// Floats of the rows treated together.
const CHUNK: usize = 16 * 1024;

/// One head: its codebook as it came [K, D] and prepared.
pub(crate) struct Head<'a> {
    pub metric: Metric,
    pub codebook: &'a [f32],
    pub dims: usize,
    /// Absent where float32 cannot be trusted, or too few rows would repay preparing.
    pub prepared: Option<Prepared>,
}

impl Head<'_> {
    fn size(&self) -> usize {
        self.codebook.len() / self.dims
    }
}

/// The `count` nearest codes of every row of `x` [n, D] into `out` [n, count].
pub(crate) fn search(level: Level, head: &Head, x: &[f32], count: usize, out: &mut [i64]) {
    let Some(prepared) = &head.prepared else { return search_exactly(head, x, count, out) };
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx2 => unsafe { search_avx2(head, prepared, x, count, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx512 => unsafe { search_avx512(head, prepared, x, count, out) },
        // SAFETY: portable vectors need no instruction set.
        _ => unsafe { search_with::<super::vector::Portable, 2>(head, prepared, x, count, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn search_avx2(head: &Head, prepared: &Prepared, x: &[f32], count: usize, out: &mut [i64]) {
    // SAFETY: this function enables the instruction set.
    unsafe { search_with::<super::vector::Avx2, 3>(head, prepared, x, count, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn search_avx512(head: &Head, prepared: &Prepared, x: &[f32], count: usize, out: &mut [i64]) {
    // SAFETY: this function enables the instruction set.
    unsafe { search_with::<super::vector::Avx512, 6>(head, prepared, x, count, out) }
}

/// Lanes of the level's vectors.
pub(crate) fn lanes(level: Level) -> usize {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => super::vector::Avx2::LANES,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => super::vector::Avx512::LANES,
        _ => super::vector::Portable::LANES,
    }
}

/// Every row against every code in float64.
fn search_exactly(head: &Head, x: &[f32], count: usize, out: &mut [i64]) {
    for (row, out) in x.chunks_exact(head.dims).zip(out.chunks_exact_mut(count)) {
        exact::nearest_of(head.metric, row, head.codebook, 0..head.size(), out);
    }
}

/// # Safety
/// As [`Vector`], and `prepared` was packed for T's lanes.
#[inline(always)]
unsafe fn search_with<T: Vector, const ROWS: usize>(
    head: &Head,
    prepared: &Prepared,
    x: &[f32],
    count: usize,
    out: &mut [i64],
) {
    let dims = head.dims;
    let width = GROUP * T::LANES;
    let panels = prepared.bias.len() / width;
    let step = (BLOCK / (dims * width)).max(1);
    let chunk = (CHUNK / dims).clamp(1, 256).next_multiple_of(ROWS);
    let mut rows = vec![0.0; chunk * dims];
    let mut errors = vec![None; chunk];
    let mut undecided = Vec::new();
    // SAFETY: the caller's promise.
    let mut tiles = vec![unsafe { Smallest::<T, ROWS>::new() }; chunk / ROWS];
    let mut scratch = Vec::new();
    for (x, out) in x.chunks(chunk * dims).zip(out.chunks_mut(chunk * count)) {
        let size = x.len() / dims;
        for (row, (x, prepared_row)) in x.chunks_exact(dims).zip(rows.chunks_exact_mut(dims)).enumerate() {
            errors[row] = prepared.prepare(x, prepared_row);
        }
        undecided.clear();
        if count == 1 {
            let tiles = &mut tiles[..size.div_ceil(ROWS)];
            // SAFETY: the caller's promise; `rows` has `chunk`, a multiple of ROWS, rows.
            unsafe {
                tiles.fill(Smallest::new());
                for first in (0..panels).step_by(step) {
                    for (tile, rows) in tiles.iter_mut().zip(rows.chunks_exact(ROWS * dims)) {
                        let block = first..(first + step).min(panels);
                        let (codes, bias) = (prepared.panels.as_ptr(), prepared.bias.as_ptr());
                        scan::<T, ROWS>(rows.as_ptr(), dims, codes, bias, block, tile);
                    }
                }
            }
            for row in 0..size {
                // SAFETY: the caller's promise.
                let (best, second, first) = unsafe { tiles[row / ROWS].winner(row % ROWS) };
                match errors[row] {
                    Some(error) if f64::from(second) - f64::from(best) > 2.0 * error => {
                        let group = (0..GROUP).map(|v| first + v * T::LANES).filter(|&k| k < head.size());
                        let x = &x[row * dims..][..dims];
                        exact::nearest_of(head.metric, x, head.codebook, group, &mut out[row..=row]);
                    }
                    _ => undecided.push(row),
                }
            }
        } else {
            undecided.extend(0..size);
        }
        for some in undecided.chunks(ROWS) {
            // SAFETY: the caller's promise.
            unsafe { rescan::<T, ROWS>(head, prepared, x, &rows, &errors, some, count, out, &mut scratch) };
        }
    }
}

/// Decides up to ROWS rows: all their float32 scores, and in float64 the codes that the error bound cannot exclude.
///
/// # Safety
/// As [`search_with`].
#[inline(always)]
unsafe fn rescan<T: Vector, const ROWS: usize>(
    head: &Head,
    prepared: &Prepared,
    x: &[f32],
    rows: &[f32],
    errors: &[Option<f64>],
    some: &[usize],
    count: usize,
    out: &mut [i64],
    scratch: &mut Vec<f32>,
) {
    let dims = head.dims;
    let size = head.size();
    let stride = prepared.bias.len();
    let mut gathered = vec![0.0; ROWS * dims];
    for (slot, &row) in gathered.chunks_exact_mut(dims).zip(some) {
        slot.copy_from_slice(&rows[row * dims..][..dims]);
    }
    scratch.resize((ROWS + 1) * stride, 0.0);
    let (scores, order) = scratch.split_at_mut(ROWS * stride);
    let panels = 0..stride / (GROUP * T::LANES);
    let (codes, bias) = (prepared.panels.as_ptr(), prepared.bias.as_ptr());
    // SAFETY: the caller's promise; `gathered` has ROWS rows and `scores` as many of `stride`.
    unsafe { scan::<T, ROWS>(gathered.as_ptr(), dims, codes, bias, panels, &mut Everything { scores, stride }) };
    for (scores, &row) in scores.chunks_exact(stride).zip(some) {
        let (x, out) = (&x[row * dims..][..dims], &mut out[row * count..][..count]);
        if x.iter().any(|value| value.is_nan()) {
            out.iter_mut().enumerate().for_each(|(k, slot)| *slot = k as i64);
            continue;
        }
        // Without an error bound every code stays.
        let limit = errors[row].map(|error| {
            order.copy_from_slice(scores);
            let kth = if count == 1 {
                order.iter().fold(f32::INFINITY, |least, &score| least.min(score))
            } else {
                *order.select_nth_unstable_by(count - 1, f32::total_cmp).1
            };
            f64::from(kth) + 2.0 * error
        });
        let list = (0..size).filter(|&k| limit.is_none_or(|limit| f64::from(scores[k]) <= limit));
        exact::nearest_of(head.metric, x, head.codebook, list, out);
    }
}
