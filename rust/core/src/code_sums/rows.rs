//! Adding up some rows in registers, a block of columns at a time.

use std::ops::Range;

use super::Element;

/// Columns that are summed in registers in one pass over the rows.
const BLOCK: usize = 64;
/// Numbers of the rows that are gone through together where they are wider than that.
const NEAR: usize = 4096;
/// Rows that memory is asked for in advance: they lie anywhere, which no processor foresees.
const AHEAD: usize = 16;

/// x [N, D] and its weights [N], with the numbers of the rows in the order of their codes.
pub(super) struct Rows<'a, X> {
    pub x: &'a [X],
    pub weights: Option<&'a [f64]>,
    pub dims: usize,
    pub order: &'a [u32],
}

impl<X> Clone for Rows<'_, X> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<X> Copy for Rows<'_, X> {}

impl<X: Element> Rows<'_, X> {
    /// Writes the sum of the finite rows at these positions of the order [D], and returns how many or how heavy they
    /// are.
    ///
    /// A number that is not finite shows in the sums, as numbers of `f32` cannot overflow them: only then are rows
    /// looked at one by one.
    #[inline(always)]
    pub(super) fn add(&self, positions: Range<usize>, sums: &mut [f64]) -> f64 {
        let count = self.add_all(positions.clone(), sums);
        if count.is_finite() && sums.iter().all(|sum| sum.is_finite()) {
            return count;
        }
        let chosen: Vec<u32> = self.order[positions].iter().copied().filter(|&row| self.is_finite(row)).collect();
        Rows { order: &chosen, ..*self }.add_all(0..chosen.len(), sums)
    }

    #[inline(always)]
    fn add_all(&self, positions: Range<usize>, sums: &mut [f64]) -> f64 {
        sums.fill(0.0);
        // Wide rows some at a time, so that they are still in the first-level cache for their next columns.
        let some = if self.dims <= BLOCK { positions.len() } else { (NEAR / self.dims).max(1) };
        let mut at = positions.start;
        while at < positions.end {
            let end = positions.end.min(at + some);
            self.add_some(&(at..end), sums);
            at = end;
        }
        let Some(weights) = self.weights else { return positions.len() as f64 };
        self.order[positions].iter().fold(0.0, |sum, &row| sum + weights[row as usize])
    }

    #[inline(always)]
    fn add_some(&self, positions: &Range<usize>, sums: &mut [f64]) {
        let mut column = 0;
        while column + BLOCK <= self.dims {
            self.columns::<BLOCK>(positions, column, sums);
            column += BLOCK;
        }
        while column + BLOCK / 4 <= self.dims {
            self.columns::<{ BLOCK / 4 }>(positions, column, sums);
            column += BLOCK / 4;
        }
        while column + BLOCK / 16 <= self.dims {
            self.columns::<{ BLOCK / 16 }>(positions, column, sums);
            column += BLOCK / 16;
        }
        while column < self.dims {
            self.columns::<1>(positions, column, sums);
            column += 1;
        }
    }

    /// Adds `COUNT` columns to their sums.
    #[inline(always)]
    fn columns<const COUNT: usize>(&self, positions: &Range<usize>, column: usize, sums: &mut [f64]) {
        let mut totals = [0.0; COUNT];
        totals.copy_from_slice(&sums[column..column + COUNT]);
        let mut at = positions.start;
        while at < positions.end {
            if at + AHEAD < self.order.len() {
                prefetch::<X, COUNT>(self.x, self.order[at + AHEAD] as usize * self.dims + column);
            }
            let row = self.order[at] as usize;
            let values = self.block::<COUNT>(row, column);
            let mut lane = 0;
            if let Some(weights) = self.weights {
                let weight = weights[row];
                while lane < COUNT {
                    totals[lane] += weight * values[lane].double();
                    lane += 1;
                }
            } else {
                while lane < COUNT {
                    totals[lane] += values[lane].double();
                    lane += 1;
                }
            }
            at += 1;
        }
        sums[column..column + COUNT].copy_from_slice(&totals);
    }

    #[inline(always)]
    fn block<const COUNT: usize>(&self, row: usize, column: usize) -> &[X; COUNT] {
        let Some(block) = self.x[row * self.dims + column..].first_chunk() else { panic!("no such row") };
        block
    }

    fn is_finite(&self, row: u32) -> bool {
        let row = row as usize;
        let values = &self.x[row * self.dims..(row + 1) * self.dims];
        values.iter().all(|value| value.double().is_finite()) && self.weights.is_none_or(|all| all[row].is_finite())
    }
}

/// Asks for the memory of `COUNT` values.
#[inline(always)]
fn prefetch<X, const COUNT: usize>(values: &[X], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let start = values.as_ptr().wrapping_add(at).cast::<i8>();
        let mut offset = 0;
        while offset < COUNT * size_of::<X>() {
            // SAFETY: a hint, of the x86-64 baseline, that reads nothing and faults on no address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(offset)) };
            offset += 64;
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, at);
}
