//! `residual_nearest_code`: every row goes through Q codebooks, each searched for what the stages before left over.
//!
//! r_0 = x; i_q = argmin_k metric(r_q, codebook_q[k]), exact as in [`crate::nearest_code`]; r_{q+1} = r_q - code_q and
//! quantized += code_q, both rounded at every stage. All codebooks are prepared once; then a block of rows passes
//! through all stages while its residual stays in the cache.

mod gradients;
#[cfg(test)]
mod tests;

use std::ops::{AddAssign, Range, SubAssign};

pub use gradients::gradients;

use crate::nearest_code::search::{self, Head};
use crate::nearest_code::{self, Metric, Row};
use crate::simd::{self, Level};
use crate::{Error, Result, threads};

/// Elements of the rows that pass through the stages together: large enough that a codebook fetched from memory serves
/// many rows, small enough that they stay in the second-level cache.
const BLOCK: usize = 1 << 17;

/// G groups of N rows and Q stages of K codes, D dimensions.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// G.
    pub groups: usize,
    /// N, of each group.
    pub rows: usize,
    /// Q.
    pub stages: usize,
    /// Codebooks of each group: Q, or 1 that all its stages share.
    pub books: usize,
    /// K.
    pub codes: usize,
    /// D.
    pub dims: usize,
}

/// What is quantized, with what.
#[derive(Debug)]
pub struct Inputs<'a, X, E> {
    /// [G, N, D].
    pub x: &'a [X],
    /// [G, Q or 1, K, D]; a smaller codebook ends in codes of NaN, which are infinitely far.
    pub codebooks: &'a [E],
    /// [G, N]: how many stages a row goes through (none below 0, all above Q).
    pub limits: Option<&'a [i64]>,
}

/// Where results go.
#[derive(Debug)]
pub struct Outputs<'a, E> {
    /// [G, N, Q]: -1 at a stage that the row does not reach.
    pub indices: &'a mut [i64],
    /// [G, N, D]: the sum of the chosen codes, from zero, in the order of the stages.
    pub quantized: &'a mut [E],
    /// [G, N, Q, D], or empty when they are not wanted: the chosen codes, zeros at -1.
    pub codes: &'a mut [E],
}

impl<E> Outputs<'_, E> {
    /// The results of the first `rows` rows, and the others.
    fn split(self, rows: usize, shape: Shape) -> (Self, Self) {
        let Shape { stages, dims, .. } = shape;
        let of_codes = if self.codes.is_empty() { 0 } else { rows * stages * dims };
        let (indices, more_indices) = self.indices.split_at_mut(rows * stages);
        let (quantized, more_quantized) = self.quantized.split_at_mut(rows * dims);
        let (codes, more_codes) = self.codes.split_at_mut(of_codes);
        (
            Self { indices, quantized, codes },
            Self { indices: more_indices, quantized: more_quantized, codes: more_codes },
        )
    }
}

/// What residuals and codes are made of.
pub trait Number: Copy + Send + Sync + Default + AddAssign + SubAssign {
    /// Whether it is not a number.
    fn is_nan(self) -> bool;
    /// In float64.
    fn wide(self) -> f64;
    /// Rounded from float64.
    fn narrow(value: f64) -> Self;
}

impl Number for f32 {
    fn is_nan(self) -> bool {
        self.is_nan()
    }

    fn wide(self) -> f64 {
        f64::from(self)
    }

    fn narrow(value: f64) -> Self {
        value as Self
    }
}

impl Number for f64 {
    fn is_nan(self) -> bool {
        self.is_nan()
    }

    fn wide(self) -> f64 {
        self
    }

    fn narrow(value: f64) -> Self {
        value
    }
}

/// Indices, the sum of the chosen codes and, where wanted, the codes themselves.
pub fn residual_nearest_code<X: Row>(
    inputs: Inputs<'_, X, f32>,
    shape: Shape,
    metric: Metric,
    outputs: Outputs<'_, f32>,
    threads: usize,
) -> Result<()> {
    residual_nearest_code_at(simd::level(), inputs, shape, metric, outputs, threads)
}

/// [`residual_nearest_code`] with the kernels of `level`, which this processor must have.
pub fn residual_nearest_code_at<X: Row>(
    level: Level,
    inputs: Inputs<'_, X, f32>,
    shape: Shape,
    metric: Metric,
    outputs: Outputs<'_, f32>,
    threads: usize,
) -> Result<()> {
    check(&inputs, shape, &outputs)?;
    if level > simd::detected() {
        return Err(Error::Argument(format!("residual_nearest_code: this processor has no {}", level.name())));
    }
    let heads = prepare(level, &inputs, shape, metric, threads);
    let find = |book: usize, residual: &[f32], found: &mut [i64]| {
        search::search(level, &heads[book], residual, 1, found, 1);
        Ok(())
    };
    share(&inputs, shape, outputs, threads, |x, residual| residual.extend_from_slice(&X::widen(x)), find)
}

/// [`residual_nearest_code`] for float64 values.
pub fn residual_nearest_code_f64(
    inputs: Inputs<'_, f64, f64>,
    shape: Shape,
    metric: Metric,
    outputs: Outputs<'_, f64>,
    threads: usize,
) -> Result<()> {
    check(&inputs, shape, &outputs)?;
    let dims = shape.dims;
    let find = |book: usize, residual: &[f64], found: &mut [i64]| {
        let codebook = &inputs.codebooks[book * shape.codes * dims..][..shape.codes * dims];
        let codes = used(codebook, dims);
        let block = nearest_code::Shape { heads: 1, rows: found.len(), codes, dims, count: 1 };
        nearest_code::nearest_code_f64(residual, &codebook[..codes * dims], block, metric, found, 1)
    };
    share(&inputs, shape, outputs, threads, |x, residual| residual.extend_from_slice(x), find)
}

fn check<X, E>(inputs: &Inputs<'_, X, E>, shape: Shape, outputs: &Outputs<'_, E>) -> Result<()> {
    let Shape { groups, rows, stages, books, codes, dims } = shape;
    let fits = inputs.x.len() == groups * rows * dims
        && inputs.codebooks.len() == groups * books * codes * dims
        && inputs.limits.is_none_or(|limits| limits.len() == groups * rows)
        && outputs.indices.len() == groups * rows * stages
        && outputs.quantized.len() == groups * rows * dims
        && (outputs.codes.is_empty() || outputs.codes.len() == groups * rows * stages * dims);
    if fits && dims > 0 && codes > 0 && stages > 0 && (books == 1 || books == stages) {
        return Ok(());
    }
    Err(Error::Argument(format!("residual_nearest_code: inputs or results do not fit {shape:?}")))
}

/// Every codebook, ready to be searched; in parallel.
fn prepare<'a, X: Sync>(
    level: Level,
    inputs: &Inputs<'a, X, f32>,
    shape: Shape,
    metric: Metric,
    threads: usize,
) -> Vec<Head<'a>> {
    let Shape { rows, codes, dims, .. } = shape;
    if rows == 0 {
        return Vec::new();
    }
    let books: Vec<&'a [f32]> = inputs.codebooks.chunks_exact(codes * dims).collect();
    let head = |book: &'a [f32]| Head::new(level, metric, &book[..used(book, dims) * dims], dims, (rows, 1));
    let (head, books) = (&head, &books);
    let tasks = threads::pieces(books.len(), (1 << 16) / (codes * dims) + 1, threads)
        .into_iter()
        .map(|piece| move || books[piece].iter().map(|book| head(book)).collect::<Vec<_>>())
        .collect();
    threads::run(tasks).into_iter().flatten().collect()
}

/// Codes of a codebook up to the last that is not padding; at least one. Codes of NaN never win, except the first.
fn used<E: Number>(codebook: &[E], dims: usize) -> usize {
    codebook.chunks_exact(dims).rposition(|code| !code[0].is_nan()).map_or(1, |last| last + 1)
}

/// All rows in parallel, numbered through all groups; `find(codebook, residuals, their nearest codes)`.
fn share<X: Sync, E: Number>(
    inputs: &Inputs<'_, X, E>,
    shape: Shape,
    outputs: Outputs<'_, E>,
    threads: usize,
    widen: impl Fn(&[X], &mut Vec<E>) + Sync,
    find: impl Fn(usize, &[E], &mut [i64]) -> Result<()> + Sync,
) -> Result<()> {
    let Shape { groups, rows, stages, codes, dims, .. } = shape;
    let grain = (1 << 20) / (stages * codes * dims) + 1;
    let mut rest = outputs;
    let mut tasks = Vec::new();
    let (widen, find) = (&widen, &find);
    for piece in threads::pieces(groups * rows, grain, threads) {
        let (own, tail) = rest.split(piece.len(), shape);
        rest = tail;
        tasks.push(move || {
            let (mut outputs, mut start) = (own, piece.start);
            let mut residual = Vec::new();
            while start < piece.end {
                let group = start / rows;
                let end = piece.end.min((group + 1) * rows).min(start + (BLOCK / dims).max(1));
                let (block, tail) = outputs.split(end - start, shape);
                residual.clear();
                widen(&inputs.x[start * dims..end * dims], &mut residual);
                through_stages(inputs, shape, group, start..end, &mut residual, block, find)?;
                (outputs, start) = (tail, end);
            }
            Ok(())
        });
    }
    threads::run(tasks).into_iter().collect()
}

/// One block of rows of a group through all stages; `residual` [n, D] comes in as x.
fn through_stages<X, E: Number>(
    inputs: &Inputs<'_, X, E>,
    shape: Shape,
    group: usize,
    block: Range<usize>,
    residual: &mut [E],
    outputs: Outputs<'_, E>,
    find: impl Fn(usize, &[E], &mut [i64]) -> Result<()>,
) -> Result<()> {
    let Shape { stages, books, codes, dims, .. } = shape;
    outputs.indices.fill(-1);
    outputs.quantized.fill(E::default());
    outputs.codes.fill(E::default());
    let limits = inputs.limits.map(|limits| &limits[block.clone()]);
    // Rows still on their way, in order; their residuals are kept packed.
    let mut rows: Vec<usize> = (0..block.len()).collect();
    let mut found = vec![0; rows.len()];
    for stage in 0..stages {
        if let Some(limits) = limits {
            keep(&mut rows, residual, dims, |row| limits[row] > stage as i64);
        }
        if rows.is_empty() {
            break;
        }
        let book = group * books + stage.min(books - 1);
        find(book, &residual[..rows.len() * dims], &mut found[..rows.len()])?;
        for ((&row, &k), residual) in rows.iter().zip(&found).zip(residual.chunks_exact_mut(dims)) {
            let code = &inputs.codebooks[(book * codes + k as usize) * dims..][..dims];
            outputs.indices[row * stages + stage] = k;
            residual.iter_mut().zip(code).for_each(|(left, &value)| *left -= value);
            let total = &mut outputs.quantized[row * dims..][..dims];
            total.iter_mut().zip(code).for_each(|(sum, &value)| *sum += value);
            if !outputs.codes.is_empty() {
                outputs.codes[(row * stages + stage) * dims..][..dims].copy_from_slice(code);
            }
        }
    }
    Ok(())
}

/// Drops the rows that are not to be kept, and closes the gaps in `residual`.
fn keep<E: Copy>(rows: &mut Vec<usize>, residual: &mut [E], dims: usize, wanted: impl Fn(usize) -> bool) {
    let mut slot = 0;
    let mut kept = 0;
    rows.retain(|&row| {
        let keep = wanted(row);
        if keep {
            residual.copy_within(slot * dims..(slot + 1) * dims, kept * dims);
            kept += 1;
        }
        slot += 1;
        keep
    });
}
