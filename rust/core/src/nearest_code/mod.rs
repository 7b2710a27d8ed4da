//! `nearest_code`: for every row the codes nearest to it, exactly, without the N x K distance matrix.
//!
//! The answer is defined in float64 (`exact`). A fast pass over packed codes (`scan`, `sinks`) finds it for nearly
//! every row and knows, by an error bound, for which it did not; those are decided in float32 and float64 (`decide`). It is
//! in float32 (`codebook`, `vector`) or, where the processor has them twice as fast, in 16-bit integers (`integer`,
//! `pairs`). For a few rows, which would not repay packing, a pass of its own reads the codes as they came (`few`). So the
//! answer depends neither on the instruction set nor on the number of threads.

pub(crate) mod codebook;
mod decide;
mod distances;
mod exact;
mod few;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
mod integer;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
mod pairs;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
mod passes;
mod scan;
pub(crate) mod search;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
mod sinks;
#[cfg(test)]
mod tests;
mod vector;

use std::borrow::Cow;
use std::ops::Range;

pub use distances::distances;
pub use exact::Real;
use half::{bf16, f16};
use search::Head;

use crate::simd::{self, Level};
use crate::{Error, Result, threads};

/// Elements of half-precision rows converted at a time.
const CONVERTED: usize = 1 << 16;

/// How far a code is from a row; smaller is nearer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// |x - e|; orders codes as its square does.
    Euclidean,
    /// |x - e|^2.
    SquaredEuclidean,
    /// 1 - x.e / (|x| |e|), 1 for a zero vector; orders codes by -x.e / |e|.
    Cosine,
    /// -x.e.
    Dot,
}

impl Metric {
    /// The metric of that name.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "euclidean" => Ok(Self::Euclidean),
            "sqeuclidean" => Ok(Self::SquaredEuclidean),
            "cosine" => Ok(Self::Cosine),
            "dot" => Ok(Self::Dot),
            _ => Err(Error::Argument(format!("nearest_code: metric is {name:?}"))),
        }
    }

    #[inline(always)]
    fn is_euclidean(self) -> bool {
        matches!(self, Self::Euclidean | Self::SquaredEuclidean)
    }
}

/// H heads of N rows and K codes of D dimensions; `count` codes are wanted a row.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// H.
    pub heads: usize,
    /// N, of each head.
    pub rows: usize,
    /// K, of each head.
    pub codes: usize,
    /// D.
    pub dims: usize,
    /// Results a row.
    pub count: usize,
}

impl Shape {
    fn check(self, x: usize, codebook: usize, out: usize) -> Result<()> {
        let Self { heads, rows, codes, dims, count } = self;
        let fits = x == heads * rows * dims && codebook == heads * codes * dims && out == heads * rows * count;
        if fits && dims > 0 && (1..=codes).contains(&count) {
            return Ok(());
        }
        Err(Error::Argument(format!("nearest_code: {x} x, {codebook} codebook, {out} results do not fit {self:?}")))
    }
}

/// Rows that are float32 or exactly become so.
pub trait Row: Copy + Send + Sync {
    /// The values as float32.
    fn widen(values: &[Self]) -> Cow<'_, [f32]>;
}

impl Row for f32 {
    fn widen(values: &[Self]) -> Cow<'_, [f32]> {
        Cow::Borrowed(values)
    }
}

impl Row for bf16 {
    fn widen(values: &[Self]) -> Cow<'_, [f32]> {
        Cow::Owned(values.iter().map(|value| value.to_f32()).collect())
    }
}

impl Row for f16 {
    fn widen(values: &[Self]) -> Cow<'_, [f32]> {
        Cow::Owned(values.iter().map(|value| value.to_f32()).collect())
    }
}

/// Indices [H, N, count] of the nearest codes, nearest first, of x [H, N, D] in codebook [H, K, D].
pub fn nearest_code<X: Row>(
    x: &[X],
    codebook: &[f32],
    shape: Shape,
    metric: Metric,
    out: &mut [i64],
    threads: usize,
) -> Result<()> {
    nearest_code_at(simd::level(), x, codebook, shape, metric, out, threads)
}

/// [`nearest_code`] with the kernels of `level`, which this processor must have.
pub fn nearest_code_at<X: Row>(
    level: Level,
    x: &[X],
    codebook: &[f32],
    shape: Shape,
    metric: Metric,
    out: &mut [i64],
    threads: usize,
) -> Result<()> {
    let Shape { rows, codes, dims, count, .. } = shape;
    shape.check(x.len(), codebook.len(), out.len())?;
    if level > simd::detected() {
        return Err(Error::Argument(format!("nearest_code: this processor has no {}", level.name())));
    }
    if rows == 0 {
        return Ok(());
    }
    let heads: Vec<Head> = codebook
        .chunks_exact(codes * dims)
        .map(|codebook| Head::new(level, metric, codebook, dims, (rows, count)))
        .collect();
    if let [head @ Head { few: true, .. }] = &heads[..] {
        // Threads share the codes.
        search::search(level, head, &X::widen(x), count, out, threads);
        return Ok(());
    }
    share(shape, out, threads, |head, range, out| {
        let part = (CONVERTED / dims).max(1);
        let x = &x[range.start * dims..range.end * dims];
        for (x, out) in x.chunks(part * dims).zip(out.chunks_mut(part * count)) {
            search::search(level, &heads[head], &X::widen(x), count, out, 1);
        }
    });
    Ok(())
}

/// [`nearest_code`] for float64 values: directly by the definition.
pub fn nearest_code_f64(
    x: &[f64],
    codebook: &[f64],
    shape: Shape,
    metric: Metric,
    out: &mut [i64],
    threads: usize,
) -> Result<()> {
    let Shape { codes, dims, count, .. } = shape;
    shape.check(x.len(), codebook.len(), out.len())?;
    share(shape, out, threads, |head, range, out| {
        let codebook = &codebook[head * codes * dims..][..codes * dims];
        for (row, out) in range.zip(out.chunks_exact_mut(count)) {
            exact::nearest_of(metric, &x[row * dims..][..dims], codebook, 0..codes, out);
        }
    });
    Ok(())
}

/// Calls `work(head, rows, their results)` over all rows, in parallel; rows are numbered through all heads.
fn share(shape: Shape, out: &mut [i64], threads: usize, work: impl Fn(usize, Range<usize>, &mut [i64]) + Sync) {
    let Shape { heads, rows, codes, dims, count } = shape;
    let grain = (1 << 20) / (codes * dims) + 1;
    let mut rest = out;
    let mut tasks = Vec::new();
    let work = &work;
    for piece in threads::pieces(heads * rows, grain, threads) {
        let (own, tail) = rest.split_at_mut(piece.len() * count);
        rest = tail;
        tasks.push(move || {
            let (mut out, mut start) = (own, piece.start);
            while start < piece.end {
                let head = start / rows;
                let end = piece.end.min((head + 1) * rows);
                let (part, tail) = out.split_at_mut((end - start) * count);
                work(head, start..end, part);
                (out, start) = (tail, end);
            }
        });
    }
    threads::run(tasks);
}
