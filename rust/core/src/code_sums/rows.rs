//! Rows, and the sums they are added to.

use std::ops::Range;

use super::{Element, Total};
use crate::simd;

/// Rows that memory is asked for in advance: they lie anywhere, which no processor foresees.
const AHEAD: usize = 8;
/// Places that rows which lie side by side are read at by turns: the processor asks memory for more than at one.
const PLACES: usize = 4;

/// Eight sums, a line of the cache: none is on two of them.
pub(super) type Line = simd::Aligned<[f64; 8]>;

/// Whether a row counts.
pub(super) fn is_finite<X: Element>(values: &[X], weight: Option<f64>) -> bool {
    values.iter().all(|value| value.double().is_finite()) && weight.is_none_or(f64::is_finite)
}

/// Adds a row [D] to sums [D / 8].
#[inline(always)]
pub(super) fn add_row<X: Element>(values: &[X], weight: Option<f64>, sums: &mut [Line]) {
    let (whole, rest) = values.as_chunks::<8>();
    let mut line = 0;
    while line + 8 <= whole.len() {
        add_lines(lines_at::<8, X>(whole, line), weight, room_at::<8>(sums, line));
        line += 8;
    }
    while line < whole.len() {
        add_line(&whole[line], weight, &mut sums[line].0);
        line += 1;
    }
    let mut lane = 0;
    while lane < rest.len() {
        sums[line].0[lane] += weight.map_or(rest[lane].double(), |weight| weight * rest[lane].double());
        lane += 1;
    }
}

#[inline(always)]
pub(super) fn lines_at<const COUNT: usize, X>(values: &[[X; 8]], line: usize) -> &[[X; 8]; COUNT] {
    let Some(lines) = values[line..].first_chunk() else { panic!("no such row") };
    lines
}

#[inline(always)]
pub(super) fn room_at<const COUNT: usize>(sums: &mut [Line], line: usize) -> &mut [Line; COUNT] {
    let Some(lines) = sums[line..].first_chunk_mut() else { panic!("no such code") };
    lines
}

/// Adds so many lines of a row to their sums, all in one stretch of instructions.
#[inline(always)]
pub(super) fn add_lines<const COUNT: usize, X: Element>(
    values: &[[X; 8]; COUNT],
    weight: Option<f64>,
    sums: &mut [Line; COUNT],
) {
    let mut line = 0;
    while line < COUNT {
        add_line(&values[line], weight, &mut sums[line].0);
        line += 1;
    }
}

#[inline(always)]
pub(super) fn add_line<X: Element>(values: &[X; 8], weight: Option<f64>, sums: &mut [f64; 8]) {
    let mut lane = 0;
    if let Some(weight) = weight {
        while lane < 8 {
            sums[lane] += weight * values[lane].double();
            lane += 1;
        }
    } else {
        while lane < 8 {
            sums[lane] += values[lane].double();
            lane += 1;
        }
    }
}

/// As many as there is room for.
#[inline(always)]
pub(super) fn write<O: Total>(totals: &[f64; 8], out: &mut [O]) {
    let mut lane = 0;
    if let Some(out) = out.first_chunk_mut::<8>() {
        while lane < 8 {
            out[lane] = O::rounded(totals[lane]);
            lane += 1;
        }
    } else {
        while lane < out.len() {
            out[lane] = O::rounded(totals[lane]);
            lane += 1;
        }
    }
}

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
    /// Writes the sum of the finite rows at these positions of the order [D / 8], and returns how many or how heavy
    /// they are.
    ///
    /// A number that is not finite shows in the sums, as numbers of `f32` cannot overflow them: only then are rows
    /// looked at one by one.
    #[inline(always)]
    pub(super) fn add(&self, positions: Range<usize>, sums: &mut [Line]) -> f64 {
        let count = self.add_all(positions.clone(), sums);
        if count.is_finite() && sums.iter().all(|line| line.0.iter().all(|sum| sum.is_finite())) {
            return count;
        }
        let is_finite = |row: usize| {
            let weight = self.weights.map(|weights| weights[row]);
            is_finite(&self.x[row * self.dims..(row + 1) * self.dims], weight)
        };
        let chosen: Vec<u32> = self.order[positions].iter().copied().filter(|&row| is_finite(row as usize)).collect();
        Rows { order: &chosen, ..*self }.add_all(0..chosen.len(), sums)
    }

    #[inline(always)]
    fn add_all(&self, positions: Range<usize>, sums: &mut [Line]) -> f64 {
        sums.fill(Line::default());
        let order = &self.order[positions.clone()];
        // Their numbers rise: so these are all from the first to the last.
        let side_by_side = matches!(order, [first, .., last] if (last - first) as usize + 1 == order.len());
        match self.dims {
            8 => self.in_registers::<8>(&positions, side_by_side, sums),
            16 => self.in_registers::<16>(&positions, side_by_side, sums),
            32 => self.in_registers::<32>(&positions, side_by_side, sums),
            64 => self.in_registers::<64>(&positions, side_by_side, sums),
            _ => self.in_memory(&positions, side_by_side, sums),
        }
        let Some(weights) = self.weights else { return order.len() as f64 };
        order.iter().fold(0.0, |sum, &row| sum + weights[row as usize])
    }

    #[inline(always)]
    fn in_memory(&self, positions: &Range<usize>, side_by_side: bool, sums: &mut [Line]) {
        let mut at = positions.start;
        if side_by_side {
            let part = positions.len() / PLACES;
            while at < positions.start + part {
                self.add_at_places(at, part, sums);
                at += 1;
            }
            at = positions.start + PLACES * part;
        }
        while at < positions.end {
            self.expect(at + AHEAD);
            let (values, weight) = self.row(at);
            add_row(values, weight, sums);
            at += 1;
        }
    }

    /// Adds the rows at `PLACES` positions so far apart, in one pass over the sums.
    #[inline(always)]
    fn add_at_places(&self, at: usize, apart: usize, sums: &mut [Line]) {
        let (whole, rest) = (self.dims / 8, self.dims % 8);
        let mut line = 0;
        while line < whole {
            let mut total = sums[line].0;
            let mut place = 0;
            while place < PLACES {
                let (values, weight) = self.row(at + place * apart);
                let Some(values) = values[8 * line..].first_chunk() else { panic!("no such line") };
                add_line(values, weight, &mut total);
                place += 1;
            }
            sums[line].0 = total;
            line += 1;
        }
        let mut place = 0;
        while place < PLACES && rest > 0 {
            let (values, weight) = self.row(at + place * apart);
            add_row(&values[8 * whole..], weight, &mut sums[whole..]);
            place += 1;
        }
    }

    /// The row at a position, and its weight.
    #[inline(always)]
    fn row(&self, at: usize) -> (&[X], Option<f64>) {
        let row = self.order[at] as usize;
        (&self.x[row * self.dims..(row + 1) * self.dims], self.weights.map(|weights| weights[row]))
    }

    /// For rows of `DIMS` numbers. One flat array, and no call of [`add_line`]: of lines the compiler made memory.
    #[inline(always)]
    fn in_registers<const DIMS: usize>(&self, positions: &Range<usize>, side_by_side: bool, sums: &mut [Line]) {
        let mut totals = [0.0; DIMS];
        let mut at = positions.start;
        if side_by_side {
            let part = positions.len() / PLACES;
            while at < positions.start + part {
                let mut place = 0;
                while place < PLACES {
                    self.add_to(at + place * part, &mut totals);
                    place += 1;
                }
                at += 1;
            }
            at = positions.start + PLACES * part;
        }
        while at < positions.end {
            self.expect(at + AHEAD);
            self.add_to(at, &mut totals);
            at += 1;
        }
        for (line, total) in sums.iter_mut().zip(totals.as_chunks::<8>().0) {
            line.0 = *total;
        }
    }

    #[inline(always)]
    fn add_to<const DIMS: usize>(&self, at: usize, totals: &mut [f64; DIMS]) {
        let row = self.order[at] as usize;
        let Some(values) = self.x[row * DIMS..].first_chunk::<DIMS>() else { panic!("no such row") };
        let mut d = 0;
        if let Some(weights) = self.weights {
            let weight = weights[row];
            while d < DIMS {
                totals[d] += weight * values[d].double();
                d += 1;
            }
        } else {
            while d < DIMS {
                totals[d] += values[d].double();
                d += 1;
            }
        }
    }

    /// Asks for the row at a position.
    #[inline(always)]
    fn expect(&self, at: usize) {
        if at < self.order.len() {
            let row = self.order[at] as usize;
            simd::prefetch(&self.x[row * self.dims..(row + 1) * self.dims]);
        }
    }
}
