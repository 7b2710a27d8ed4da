//! `code_sums`: for every code, the sum of the rows given to it and how many they are.
//!
//! In `f64`, and where the rows are cut depends on the numbers alone: so no bit depends on the threads or the
//! instruction set, and a code that has all the rows is shared out like any others. Sums that fit in a processor's cache
//! are added to as the rows come ([`streamed`]); others, and those of rows that come in runs of a code, are made one
//! code after the other, from sorted rows ([`sorted`]).

mod element;
mod rows;
mod sorted;
mod streamed;
#[cfg(test)]
mod tests;

pub use element::{Element, Total};

use crate::simd::{self, Level};
use crate::{Error, Result};

/// Rows of a run that are worth keeping its sums in registers.
const RUN: usize = 16;
/// Pairs of neighbours that runs are looked for in.
const SOME: usize = 1024;

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

/// What is added up, checked.
#[derive(Debug, Clone, Copy)]
struct Given<'a, X> {
    x: &'a [X],
    indices: &'a [i64],
    weights: Option<&'a [f64]>,
    shape: Shape,
}

/// Writes sums and counts, which hold zeros, each a total in `f64`, rounded once: of a large codebook, what belongs to
/// no row is left as it is, so that its memory is not touched for a few rows. Index -1 skips a row, and so does a number
/// in the row or its weight that is not finite; an index outside -1..K is an error.
pub fn code_sums<X: Element, O: Total>(
    x: &[X],
    indices: &[i64],
    weights: Option<&[f64]>,
    shape: Shape,
    sums: &mut [O],
    counts: &mut [O],
    threads: usize,
) -> Result<()> {
    code_sums_at(simd::level(), x, indices, weights, shape, sums, counts, threads)
}

/// [`code_sums`] at a level of one's own choice.
pub fn code_sums_at<X: Element, O: Total>(
    level: Level,
    x: &[X],
    indices: &[i64],
    weights: Option<&[f64]>,
    shape: Shape,
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
    check(indices, shape)?;
    let given = Given { x, indices, weights, shape };
    let in_runs = in_runs(indices);
    if streamed::suits(shape) && !in_runs {
        streamed::add(level, given, sums, counts, threads);
    } else {
        sorted::add(level, given, in_runs, sums, counts, threads);
    }
    Ok(())
}

/// Whether rows of a code follow each other, so that they lie side by side also when sorted; judged by some of them.
fn in_runs(indices: &[i64]) -> bool {
    let pairs = indices.windows(2).step_by((indices.len() / SOME).max(1));
    let (count, changes) = pairs.fold((0, 0), |(all, some), pair| (all + 1, some + usize::from(pair[0] != pair[1])));
    changes < count / RUN
}

/// An error for the first index outside -1..K.
fn check(indices: &[i64], shape: Shape) -> Result<()> {
    if u32::try_from(indices.len()).is_err() {
        return Err(Error::Argument(format!("code_sums: indices are {}, expected fewer than 2^32", indices.len())));
    }
    let codes = shape.codes as i64;
    // Whole blocks without a branch inside, which the compiler vectorises.
    let outside = |index: &i64| *index < -1 || *index >= codes;
    let block = indices.chunks(4096).position(|block| block.iter().fold(false, |any, index| any | outside(index)));
    let Some(row) = block.and_then(|block| Some(block * 4096 + indices[block * 4096..].iter().position(outside)?))
    else {
        return Ok(());
    };
    let (index, head, row) = (indices[row], row / shape.rows, row % shape.rows);
    let head = if shape.heads == 1 { String::new() } else { format!(" of head {head}") };
    let expected = match shape.codes {
        0 => "only -1".to_owned(),
        codes => format!("-1 to {}", codes - 1),
    };
    Err(Error::Argument(format!("code_sums: indices hold {index} in row {row}{head}, expected {expected}")))
}
