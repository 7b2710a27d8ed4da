//! `code_sums`: for every code, the sum of the rows given to it and how many they are.
//!
//! The rows are sorted by code, and the sorted rows are cut into chunks of a fixed length. What a chunk holds of a code
//! is summed in the order of the rows, in `f64`; a code in several chunks is the sum of its parts in order. So no bit
//! depends on the threads or the instruction set, and a code that has all the rows is shared out like any others.

mod element;
mod rows;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use element::Element;
use rows::Rows;

use crate::simd::{self, Kernel, Lanes, Level};
use crate::threads;
use crate::{Error, Result};

/// Sorted rows between two cuts: enough to hide what a cut costs, few enough to share out.
const CHUNK: usize = 1024;
/// Numbers that are worth a thread.
const GRAIN: usize = 1 << 16;

/// Sizes: x [H, N, D], indices [H, N], sums [H, K, D], counts [H, K].
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// H
    pub heads: usize,
    /// N
    pub rows: usize,
    /// K
    pub codes: usize,
    /// D
    pub dims: usize,
}

/// Writes sums and counts, which hold zeros, each a total in `f64` given to `round`: what belongs to no row is left as
/// it is, so that the memory of a large codebook is not touched for a few rows. Index -1 skips a row, and so does a number in the
/// row or its weight that is not finite; an index outside -1..K is an error.
pub fn code_sums<X: Element, O: Copy + Send>(
    x: &[X],
    indices: &[i64],
    weights: Option<&[f64]>,
    shape: Shape,
    round: fn(f64) -> O,
    sums: &mut [O],
    counts: &mut [O],
    threads: usize,
) -> Result<()> {
    code_sums_at(simd::level(), x, indices, weights, shape, round, sums, counts, threads)
}

/// [`code_sums`] at a level of one's own choice.
pub fn code_sums_at<X: Element, O: Copy + Send>(
    level: Level,
    x: &[X],
    indices: &[i64],
    weights: Option<&[f64]>,
    shape: Shape,
    round: fn(f64) -> O,
    sums: &mut [O],
    counts: &mut [O],
    threads: usize,
) -> Result<()> {
    let Shape { heads, rows, codes, dims } = shape;
    let lengths = [x.len(), indices.len(), weights.map_or(indices.len(), <[f64]>::len), sums.len(), counts.len()];
    if lengths != [heads * rows * dims, heads * rows, heads * rows, heads * codes * dims, heads * codes] {
        return Err(Error::Argument(format!(
            "code_sums: x, indices, weights, sums and counts have {lengths:?} elements, not those of {shape:?}"
        )));
    }
    let (offsets, order) = sort(indices, shape)?;
    let rows = Rows { x, weights, dims, order: &order };
    let (mut sums_left, mut counts_left, mut first) = (&mut *sums, &mut *counts, 0);
    let pieces = threads::pieces(order.len().div_ceil(CHUNK), GRAIN.div_ceil(CHUNK * dims.max(1)), threads);
    let last = pieces.len().saturating_sub(1);
    let mut tasks = Vec::new();
    for (number, chunks) in pieces.into_iter().enumerate() {
        let positions = chunks.start * CHUNK..order.len().min(chunks.end * CHUNK);
        let starts = &offsets[..heads * codes];
        let end = if number == last { heads * codes } else { starts.partition_point(|&at| at < positions.end) };
        let sums = sums_left.split_off_mut(..(end - first) * dims).unwrap_or_default();
        let counts = counts_left.split_off_mut(..end - first).unwrap_or_default();
        let piece = Piece { rows, offsets: &offsets, positions, codes: first..end, round, sums, counts };
        tasks.push(move || simd::run(level, piece));
        first = end;
    }
    let parts: Vec<Part> = threads::run(tasks).into_iter().flatten().collect();
    for parts in parts.chunk_by(|one, next| one.code == next.code) {
        let code = parts[0].code;
        counts[code] = round(parts.iter().map(|part| part.count).sum());
        for (d, sum) in sums[code * dims..(code + 1) * dims].iter_mut().enumerate() {
            *sum = round(parts.iter().map(|part| part.sums[d]).sum());
        }
    }
    Ok(())
}

/// Where each code's rows begin [H K + 1], and the numbers of the rows that have a code, by code and then by number.
fn sort(indices: &[i64], shape: Shape) -> Result<(Vec<usize>, Vec<u32>)> {
    if u32::try_from(indices.len()).is_err() {
        return Err(Error::Argument(format!("code_sums: indices are {}, expected fewer than 2^32", indices.len())));
    }
    let mut ends = vec![0; shape.heads * shape.codes + 1];
    for (head, indices) in indices.chunks(shape.rows.max(1)).enumerate() {
        let ends = &mut ends[head * shape.codes..][1..=shape.codes];
        let mut row = 0;
        // Equal neighbours are counted together: a hot code would make each addition wait for the one before.
        for run in indices.chunk_by(|one, next| one == next) {
            match usize::try_from(run[0]) {
                Ok(code) if code < shape.codes => ends[code] += run.len(),
                _ if run[0] == -1 => {}
                _ => return Err(outside(run[0], head, row, shape)),
            }
            row += run.len();
        }
    }
    let mut total = 0;
    for end in &mut ends {
        total += *end;
        *end = total;
    }
    let offsets = ends.clone();
    let mut order = vec![0; total];
    for (head, indices) in indices.chunks(shape.rows.max(1)).enumerate() {
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
    Ok((offsets, order))
}

fn outside(index: i64, head: usize, row: usize, shape: Shape) -> Error {
    let head = if shape.heads == 1 { String::new() } else { format!(" of head {head}") };
    let expected = match shape.codes {
        0 => "only -1".to_owned(),
        codes => format!("-1 to {}", codes - 1),
    };
    Error::Argument(format!("code_sums: indices hold {index} in row {row}{head}, expected {expected}"))
}

/// What one chunk holds of a code that reaches beyond it.
struct Part {
    code: usize,
    count: f64,
    sums: Vec<f64>,
}

/// A thread's share: some whole chunks, and the sums of the codes that begin in them.
struct Piece<'a, X, O> {
    rows: Rows<'a, X>,
    offsets: &'a [usize],
    positions: Range<usize>,
    codes: Range<usize>,
    round: fn(f64) -> O,
    sums: &'a mut [O],
    counts: &'a mut [O],
}

impl<X: Element, O: Copy> Kernel for Piece<'_, X, O> {
    type Output = Vec<Part>;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Vec<Part> {
        let dims = self.rows.dims;
        let mut parts = Vec::new();
        let mut sums = vec![0.0; dims];
        // The code before the first may reach into these chunks.
        let mut code = self.codes.start.saturating_sub(1);
        while code < self.codes.end {
            let (start, end) = (self.offsets[code], self.offsets[code + 1]);
            if start == end || start / CHUNK == (end - 1) / CHUNK {
                if code >= self.codes.start && start < end {
                    let count = self.rows.add(start..end, &mut sums);
                    let at = code - self.codes.start;
                    self.counts[at] = (self.round)(count);
                    let mut d = 0;
                    while d < dims {
                        self.sums[at * dims + d] = (self.round)(sums[d]);
                        d += 1;
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
            code += 1;
        }
        parts
    }
}
