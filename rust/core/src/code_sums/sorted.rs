//! Code by code: the rows are sorted by code, and the sorted rows are cut into chunks of a fixed length. What a chunk
//! holds of a code is summed in the order of the rows; a code in several chunks is the sum of its parts in order.

use std::ops::Range;

use super::rows::{Line, Rows, write};
use super::{Element, Given, Shape, Total};
use crate::simd::{self, Kernel, Lanes, Level};
use crate::threads;

/// Sorted rows between two cuts: enough to hide what a cut costs, few enough to share out.
const CHUNK: usize = 1024;
/// Numbers that are worth a thread.
const GRAIN: usize = 1 << 16;
/// The same where rows come in runs of a code: one thread reads them nearly as fast as memory gives them to several.
const GRAIN_IN_RUNS: usize = 1 << 22;
/// Codes to a row beyond which rows are sorted by comparison, as counting would go through the codes.
const SPARSE: usize = 4;

pub(super) fn add<X: Element, O: Total>(
    level: Level,
    given: Given<X>,
    in_runs: bool,
    sums: &mut [O],
    counts: &mut [O],
    threads: usize,
) {
    let Given { x, indices, weights, shape } = given;
    let dims = shape.dims;
    let grain = if in_runs { GRAIN_IN_RUNS } else { GRAIN };
    let Sorted { order, runs } = sort(indices, shape);
    let rows = Rows { x, weights, dims, order: &order };
    let (mut sums_left, mut counts_left, mut first, mut first_code) = (&mut *sums, &mut *counts, 0, 0);
    let mut tasks = Vec::new();
    for chunks in threads::pieces(order.len().div_ceil(CHUNK), grain.div_ceil(CHUNK * dims.max(1)), threads) {
        let positions = chunks.start * CHUNK..order.len().min(chunks.end * CHUNK);
        let end = runs.partition_point(|run| run.start < positions.end);
        // Up to the first code of the next piece, or the last.
        let end_code = runs.get(end).map_or(shape.heads * shape.codes, |run| run.code);
        let sums = sums_left.split_off_mut(..(end_code - first_code) * dims).unwrap_or_default();
        let counts = counts_left.split_off_mut(..end_code - first_code).unwrap_or_default();
        let piece = Piece { rows, runs: &runs, positions, own: first..end, first_code, sums, counts };
        tasks.push(move || simd::run(level, piece));
        (first, first_code) = (end, end_code);
    }
    let parts: Vec<Part> = threads::run(tasks).into_iter().flatten().collect();
    for parts in parts.chunk_by(|one, next| one.code == next.code) {
        let code = parts[0].code;
        counts[code] = O::rounded(parts.iter().map(|part| part.count).sum());
        for (d, sum) in sums[code * dims..(code + 1) * dims].iter_mut().enumerate() {
            *sum = O::rounded(parts.iter().map(|part| part.sums[d / 8].0[d % 8]).sum());
        }
    }
}

/// Rows that have a code, by code and then by number.
struct Sorted {
    /// Their numbers.
    order: Vec<u32>,
    /// The codes that have rows, in order.
    runs: Vec<Run>,
}

/// Where the rows of a code begin; they end where those of the next one do, or at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    code: usize,
    start: usize,
}

fn sort(indices: &[i64], shape: Shape) -> Sorted {
    let all = shape.heads * shape.codes;
    if all / SPARSE > indices.len() && u32::try_from(all).is_ok() {
        compared(indices, shape)
    } else {
        counted(indices, shape)
    }
}

/// Sorted by comparing them, in time that does not grow with the codes.
fn compared(indices: &[i64], shape: Shape) -> Sorted {
    let mut keys = Vec::with_capacity(indices.len());
    for (row, &index) in indices.iter().enumerate() {
        if let Ok(code) = u64::try_from(index) {
            let code = (row / shape.rows * shape.codes) as u64 + code;
            keys.push(code << 32 | row as u64);
        }
    }
    keys.sort_unstable();
    let mut runs = Vec::new();
    for (start, key) in keys.iter().enumerate() {
        let code = (key >> 32) as usize;
        if runs.last().is_none_or(|run: &Run| run.code != code) {
            runs.push(Run { code, start });
        }
    }
    Sorted { order: keys.into_iter().map(|key| key as u32).collect(), runs }
}

/// Sorted by counting the rows of every code.
fn counted(indices: &[i64], shape: Shape) -> Sorted {
    let heads = || indices.chunks(shape.rows.max(1)).enumerate();
    let mut ends = vec![0; shape.heads * shape.codes];
    for (head, indices) in heads() {
        let ends = &mut ends[head * shape.codes..][..shape.codes];
        // Equal neighbours are counted together: a hot code would make each addition wait for the one before.
        for run in indices.chunk_by(|one, next| one == next) {
            if let Ok(code) = usize::try_from(run[0]) {
                ends[code] += run.len();
            }
        }
    }
    let (mut start, mut runs) = (0, Vec::new());
    for (code, end) in ends.iter_mut().enumerate() {
        if *end > 0 {
            runs.push(Run { code, start });
        }
        start += *end;
        *end = start - *end;
    }
    let mut order = vec![0; start];
    for (head, indices) in heads() {
        let (ends, mut row) = (&mut ends[head * shape.codes..], (head * shape.rows) as u32);
        for run in indices.chunk_by(|one, next| one == next) {
            if let Ok(code) = usize::try_from(run[0]) {
                for slot in &mut order[ends[code]..ends[code] + run.len()] {
                    *slot = row;
                    row += 1;
                }
                ends[code] += run.len();
            } else {
                row += run.len() as u32;
            }
        }
    }
    Sorted { order, runs }
}

/// What one chunk holds of a code that reaches beyond it.
struct Part {
    code: usize,
    count: f64,
    sums: Vec<Line>,
}

/// A thread's share: some whole chunks, and the sums of the codes that begin in them.
struct Piece<'a, X, O> {
    rows: Rows<'a, X>,
    runs: &'a [Run],
    positions: Range<usize>,
    /// Runs that begin in the chunks.
    own: Range<usize>,
    /// The code of the first sum.
    first_code: usize,
    sums: &'a mut [O],
    counts: &'a mut [O],
}

impl<X: Element, O: Total> Kernel for Piece<'_, X, O> {
    type Output = Vec<Part>;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Vec<Part> {
        let dims = self.rows.dims;
        let mut parts = Vec::new();
        let mut sums = vec![Line::default(); dims.div_ceil(8)];
        // The code before the first may reach into these chunks.
        let mut number = self.own.start.saturating_sub(1);
        while number < self.own.end {
            let Run { code, start } = self.runs[number];
            let end = if number + 1 < self.runs.len() { self.runs[number + 1].start } else { self.rows.order.len() };
            if start / CHUNK == (end - 1) / CHUNK {
                if number >= self.own.start {
                    let count = self.rows.add(start..end, &mut sums);
                    let at = code - self.first_code;
                    self.counts[at] = O::rounded(count);
                    let out = &mut self.sums[at * dims..(at + 1) * dims];
                    let mut line = 0;
                    while line < sums.len() {
                        write(&sums[line].0, &mut out[8 * line..]);
                        line += 1;
                    }
                }
            } else {
                let mut from = start.max(self.positions.start);
                while from < end.min(self.positions.end) {
                    let to = end.min((from / CHUNK + 1) * CHUNK);
                    let count = self.rows.add(from..to, &mut sums);
                    parts.push(Part { code, count, sums: sums.clone() });
                    from = to;
                }
            }
            number += 1;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sorts_are_the_same() {
        for (heads, rows, codes) in [(1, 0, 3), (1, 1000, 3), (3, 100, 70), (2, 10, 5000)] {
            let shape = Shape { heads, rows, codes, dims: 1 };
            let indices: Vec<i64> =
                (0..(heads * rows) as i64).map(|row| row * row * 7919 % (codes as i64 + 1) - 1).collect();
            let (one, two) = (counted(&indices, shape), compared(&indices, shape));
            assert_eq!((one.order, one.runs), (two.order, two.runs));
        }
    }
}
