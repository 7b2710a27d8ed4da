//! The fast pass: float32 scores of a few rows against panels of codes, in registers, and two ways to consume them.

use super::GROUP;
use super::vector::Vector;

/// What becomes of the scores of one row against one panel.
pub(super) trait Sink<T: Vector> {
    /// # Safety
    /// As [`Vector`]; `row` and `panel` are in the range the sink was made for.
    unsafe fn take(&mut self, row: usize, panel: usize, scores: &[T; GROUP]);
}

/// Scores of `ROWS` consecutive rows (from `x`, D apart) against `panels`, each handed to the sink.
///
/// # Safety
/// As [`Vector`]; `x` holds ROWS * D floats, `codes` the panels [.., D, GROUP * LANES] and `bias` their biases.
#[inline(always)]
pub(super) unsafe fn scan<T: Vector, const ROWS: usize>(
    x: *const f32,
    dims: usize,
    codes: *const f32,
    bias: *const f32,
    panels: std::ops::Range<usize>,
    sink: &mut impl Sink<T>,
) {
    let width = GROUP * T::LANES;
    for panel in panels {
        // SAFETY: the pointers stay inside what the caller promised: panel, d, row and v are below their bounds.
        unsafe {
            let bias = bias.add(panel * width);
            let mut code = codes.add(panel * dims * width);
            // Vector by vector of codes, so that sums, factors and one code fit the registers.
            let mut scores = [
                [T::load(bias); ROWS],
                [T::load(bias.add(T::LANES)); ROWS],
                [T::load(bias.add(2 * T::LANES)); ROWS],
                [T::load(bias.add(3 * T::LANES)); ROWS],
            ];
            for d in 0..dims {
                let mut factors = [T::splat(0.0); ROWS];
                for (row, factor) in factors.iter_mut().enumerate() {
                    *factor = T::splat(*x.add(row * dims + d));
                }
                for (v, scores) in scores.iter_mut().enumerate() {
                    let value = T::load(code.add(v * T::LANES));
                    for (score, factor) in scores.iter_mut().zip(factors) {
                        *score = score.minus_product(factor, value);
                    }
                }
                code = code.add(width);
            }
            #[allow(clippy::needless_range_loop)] // it walks the inner axis of four arrays
            for row in 0..ROWS {
                sink.take(row, panel, &[scores[0][row], scores[1][row], scores[2][row], scores[3][row]]);
            }
        }
    }
}

/// Tracks, lane by lane, the smallest and second-smallest of the groups' minima, and the panel of the smallest. A
/// group is the `GROUP` codes of a panel that share a lane; which of them won is left to float64.
#[derive(Clone, Copy)]
pub(super) struct Smallest<T, const ROWS: usize> {
    best: [T; ROWS],
    second: [T; ROWS],
    panel: [T; ROWS],
}

impl<T: Vector, const ROWS: usize> Smallest<T, ROWS> {
    /// # Safety
    /// As [`Vector`].
    #[inline(always)]
    pub unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        let infinite = unsafe { T::splat(f32::INFINITY) };
        Self { best: [infinite; ROWS], second: [infinite; ROWS], panel: [infinite; ROWS] }
    }

    /// The row's smallest and second-smallest group minimum, and the first code of the smallest's group (the others
    /// follow at steps of LANES).
    ///
    /// # Safety
    /// As [`Vector`].
    #[inline(always)]
    pub unsafe fn winner(&self, row: usize) -> (f32, f32, usize) {
        let (mut best, mut second, mut panel) = ([0.0; 16], [0.0; 16], [0.0; 16]);
        // SAFETY: the caller's promise; no register has more than 16 lanes.
        unsafe {
            self.best[row].store(best.as_mut_ptr());
            self.second[row].store(second.as_mut_ptr());
            self.panel[row].store(panel.as_mut_ptr());
        }
        let mut lane = 0;
        let mut others = f32::INFINITY;
        for other in 1..T::LANES {
            if best[other] < best[lane] {
                others = others.min(best[lane]);
                lane = other;
            } else {
                others = others.min(best[other]);
            }
        }
        let first = panel[lane].to_bits() as usize * GROUP * T::LANES + lane;
        (best[lane], others.min(second[lane]), first)
    }
}

impl<T: Vector, const ROWS: usize> Sink<T> for Smallest<T, ROWS> {
    #[inline(always)]
    unsafe fn take(&mut self, row: usize, panel: usize, scores: &[T; GROUP]) {
        // SAFETY: the caller's promise. The panel number travels as bits: vectors only move it.
        unsafe {
            let smallest = scores[0].min(scores[1]).min(scores[2].min(scores[3]));
            let number = T::splat(f32::from_bits(panel as u32));
            self.panel[row] = T::select_less(smallest, self.best[row], number, self.panel[row]);
            self.second[row] = self.second[row].min(self.best[row].max(smallest));
            self.best[row] = self.best[row].min(smallest);
        }
    }
}

/// Keeps every score: [ROWS, panels * GROUP * LANES].
pub(super) struct Everything<'a> {
    pub scores: &'a mut [f32],
    pub stride: usize,
}

impl<T: Vector> Sink<T> for Everything<'_> {
    #[inline(always)]
    unsafe fn take(&mut self, row: usize, panel: usize, scores: &[T; GROUP]) {
        let start = row * self.stride + panel * GROUP * T::LANES;
        let out = &mut self.scores[start..start + GROUP * T::LANES];
        for (v, score) in scores.iter().enumerate() {
            // SAFETY: the caller's promise; `out` has room for GROUP vectors.
            unsafe { score.store(out.as_mut_ptr().add(v * T::LANES)) };
        }
    }
}
