//! As the rows come: each is added to its code's sums, which stay in the cache, and the processor sees from afar which
//! rows are next.
//!
//! The rows are cut into parts whose number depends on the shape alone, each with sums of its own, which are then added
//! up in order.

use std::ops::Range;

use super::rows::{Line, add_line, add_lines, add_row, is_finite, lines_at, room_at, write};
use super::{Element, Given, Shape, Total};
use crate::simd::{self, Kernel, Lanes, Level};
use crate::threads;

/// Sums that stay in a second-level cache: 1 MiB.
const CACHED: usize = 1 << 17;
/// Parts, at most: as many threads.
const PARTS: usize = 8;
/// Numbers of x that memory is asked for in advance, as the processor's own guesses end with every page.
const AHEAD: usize = 4096;
/// Rows that are worth a part.
const WORTH: usize = 8192;

/// Whether the sums stay in the cache, and there are rows enough to go through all of them.
pub(super) fn suits(shape: Shape) -> bool {
    shape.codes * shape.dims.next_multiple_of(8) <= CACHED && shape.codes <= shape.rows
}

/// How many parts: more where the sums are few, but at least two to share out.
fn parts(shape: Shape) -> usize {
    (CACHED / (shape.codes * shape.dims).max(1)).clamp(2, PARTS).min(shape.rows / WORTH).max(1)
}

pub(super) fn add<X: Element, O: Total>(
    level: Level,
    given: Given<X>,
    sums: &mut [O],
    counts: &mut [O],
    threads: usize,
) {
    let Given { x, indices, weights, shape } = given;
    let Shape { heads, rows, codes, dims } = shape;
    let parts = parts(shape);
    let part = |head: usize, number: usize, checked: bool| {
        let at = head * rows + rows * number / parts..head * rows + rows * (number + 1) / parts;
        let (x, indices) = (&x[at.start * dims..at.end * dims], &indices[at.clone()]);
        Part { x, indices, weights: weights.map(|all| &all[at]), codes, dims, checked }
    };
    let added = |head: usize, checked: bool| -> Vec<Held> {
        let task = |numbers: Range<usize>| {
            move || numbers.map(|number| simd::run(level, part(head, number, checked))).collect::<Vec<_>>()
        };
        let tasks = threads::pieces(parts, 1, threads).into_iter().map(task).collect();
        threads::run(tasks).into_iter().flatten().collect()
    };
    for head in 0..heads {
        let mut all = added(head, false);
        // A number that is not finite shows in the sums, as numbers of `f32` cannot overflow them: only then is each row
        // looked at.
        if !all.iter().all(|part| part.finite) {
            all = added(head, true);
        }
        let sums = &mut sums[head * codes * dims..(head + 1) * codes * dims];
        let counts = &mut counts[head * codes..(head + 1) * codes];
        simd::run(level, Totals { parts: &all, dims, sums, counts });
    }
}

/// What some rows hold of every code: [K, D / 8] and [K].
struct Held {
    sums: Vec<Line>,
    counts: Vec<f64>,
    finite: bool,
}

/// Some rows, to be added up; those that are not finite left out where they are `checked`.
struct Part<'a, X> {
    x: &'a [X],
    indices: &'a [i64],
    weights: Option<&'a [f64]>,
    codes: usize,
    dims: usize,
    checked: bool,
}

impl<X: Element> Kernel for Part<'_, X> {
    type Output = Held;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Held {
        match self.dims {
            8 => self.held::<1>(),
            16 => self.held::<2>(),
            32 => self.held::<4>(),
            64 => self.held::<8>(),
            _ => self.held::<0>(),
        }
    }
}

impl<X: Element> Part<'_, X> {
    /// Of rows of so many lines; 0 for any.
    #[inline(always)]
    fn held<const LINES: usize>(self) -> Held {
        let dims = self.dims;
        let lines = dims.div_ceil(8);
        let mut sums = vec![Line::default(); self.codes * lines];
        let mut counts = vec![0.0; self.codes];
        let mut row = 0;
        while row < self.indices.len() {
            let code = self.indices[row];
            let values = &self.x[row * dims..(row + 1) * dims];
            let ahead = row * dims + AHEAD;
            if ahead + dims <= self.x.len() {
                simd::prefetch(&self.x[ahead..ahead + dims]);
            }
            let weight = self.weights.map(|weights| weights[row]);
            row += 1;
            if code < 0 || self.checked && !is_finite(values, weight) {
                continue;
            }
            let code = code as usize;
            let sums = &mut sums[code * lines..(code + 1) * lines];
            if LINES > 0 {
                add_lines(lines_at::<LINES, X>(values.as_chunks().0, 0), weight, room_at::<LINES>(sums, 0));
            } else {
                add_row(values, weight, sums);
            }
            counts[code] += weight.unwrap_or(1.0);
        }
        // 0 times a number that is not finite is NaN.
        let mut zeros = [0.0; 8];
        let mut at = 0;
        while at < sums.len() {
            add_line(&sums[at].0, Some(0.0), &mut zeros);
            at += 1;
        }
        let mut at = 0;
        while at < counts.len() {
            zeros[0] += 0.0 * counts[at];
            at += 1;
        }
        Held { sums, counts, finite: zeros.iter().all(|zero| zero.is_finite()) }
    }
}

/// The totals of all parts.
struct Totals<'a, O> {
    parts: &'a [Held],
    dims: usize,
    sums: &'a mut [O],
    counts: &'a mut [O],
}

impl<O: Total> Kernel for Totals<'_, O> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let lines = self.dims.div_ceil(8);
        let mut code = 0;
        while code < self.counts.len() {
            let out = &mut self.sums[code * self.dims..(code + 1) * self.dims];
            let mut line = 0;
            while line < lines {
                let mut total = [0.0; 8];
                let mut part = 0;
                while part < self.parts.len() {
                    add_line(&self.parts[part].sums[code * lines + line].0, None, &mut total);
                    part += 1;
                }
                write(&total, &mut out[8 * line..]);
                line += 1;
            }
            let mut total = 0.0;
            let mut part = 0;
            while part < self.parts.len() {
                total += self.parts[part].counts[code];
                part += 1;
            }
            self.counts[code] = O::rounded(total);
            code += 1;
        }
    }
}
