//! From rows to the codes chosen for them.

use super::exact::{Real, length};
use super::{Metric, Shape};
use crate::{Error, Result, threads};

/// metric(x, codebook[indices]): x [H, N, D], codebook [H, K, D], indices [H, N, k] -> [H, N, k], float64 inside.
///
/// A NaN that does not come from the row itself reads as infinitely far.
pub fn distances<X: Real, E: Real, O: Send>(
    x: &[X],
    codebook: &[E],
    indices: &[i64],
    shape: Shape,
    metric: Metric,
    convert: impl Fn(f64) -> O + Copy + Send + Sync,
    out: &mut [O],
    threads: usize,
) -> Result<()> {
    let Shape { heads, rows, codes, dims, count } = shape;
    shape.check(x.len(), codebook.len(), out.len())?;
    if indices.len() != out.len() || indices.iter().any(|&k| k < 0 || k as usize >= codes) {
        return Err(Error::Argument(format!(
            "nearest_code_distances: indices must be in 0..{codes}, one per distance"
        )));
    }
    let pieces = threads::pieces(heads * rows, (1 << 16) / (dims * count) + 1, threads);
    let mut rest = out;
    let mut tasks = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let (out, tail) = rest.split_at_mut(piece.len() * count);
        rest = tail;
        tasks.push(move || {
            for (row, out) in piece.zip(out.chunks_exact_mut(count)) {
                let x = &x[row * dims..][..dims];
                let codebook = &codebook[row / rows * codes * dims..];
                for (out, &k) in out.iter_mut().zip(&indices[row * count..]) {
                    *out = convert(distance(metric, x, &codebook[k as usize * dims..][..dims]));
                }
            }
        });
    }
    threads::run(tasks);
    Ok(())
}

fn distance<X: Real, E: Real>(metric: Metric, x: &[X], code: &[E]) -> f64 {
    let pairs = x.iter().zip(code).map(|(x, e)| (x.real(), e.real()));
    let value = match metric {
        Metric::Euclidean => pairs.fold(0.0, |sum, (x, e)| sum + (x - e) * (x - e)).sqrt(),
        Metric::SquaredEuclidean => pairs.fold(0.0, |sum, (x, e)| sum + (x - e) * (x - e)),
        Metric::Dot => pairs.fold(0.0, |sum, (x, e)| sum - x * e),
        Metric::Cosine => {
            let norms = length(x) * length(code);
            1.0 - if norms == 0.0 { 0.0 } else { pairs.fold(0.0, |sum, (x, e)| sum + x * e) / norms }
        }
    };
    if value.is_nan() && !x.iter().any(|value| value.real().is_nan()) { f64::INFINITY } else { value }
}
