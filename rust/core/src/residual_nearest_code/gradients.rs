//! The gradient in the codebooks: each code collects the gradients of the rows that chose it.

use std::ops::Range;

use super::{Number, Shape};
use crate::{Error, Result, threads};

/// out [G, Q, K, D]: out[g, q, k] = sum over the rows n with indices[g, n, q] = k, in order and in float64, of
/// of_quantized[g, n] + of_codes[g, n, q]. `of_codes` is [G, N, Q, D] or empty. The same for any number of threads.
pub fn gradients<E: Number>(
    of_quantized: &[E],
    of_codes: &[E],
    indices: &[i64],
    shape: Shape,
    out: &mut [E],
    threads: usize,
) -> Result<()> {
    let Shape { groups, rows, stages, codes, dims, .. } = shape;
    let fits = of_quantized.len() == groups * rows * dims
        && (of_codes.is_empty() || of_codes.len() == groups * rows * stages * dims)
        && indices.len() == groups * rows * stages
        && out.len() == groups * stages * codes * dims;
    if !fits || dims == 0 || codes == 0 || indices.iter().any(|&k| k < -1 || k >= codes as i64) {
        return Err(Error::Argument(format!("residual_nearest_code: gradients or indices do not fit {shape:?}")));
    }
    let grain = (1 << 16) / ((rows / codes + 1) * dims) + 1;
    let mut rest = out;
    let mut tasks = Vec::new();
    for piece in threads::pieces(groups * stages * codes, grain, threads) {
        let (own, tail) = rest.split_at_mut(piece.len() * dims);
        rest = tail;
        tasks.push(move || {
            let (mut out, mut start) = (own, piece.start);
            while start < piece.end {
                let book = start / codes;
                let end = piece.end.min((book + 1) * codes);
                let (part, tail) = out.split_at_mut((end - start) * dims);
                let wanted = start - book * codes..end - book * codes;
                of_book(of_quantized, of_codes, indices, shape, book, wanted, part);
                (out, start) = (tail, end);
            }
        });
    }
    threads::run(tasks);
    Ok(())
}

/// The codes `wanted` of one codebook, numbered through all groups.
fn of_book<E: Number>(
    of_quantized: &[E],
    of_codes: &[E],
    indices: &[i64],
    shape: Shape,
    book: usize,
    wanted: Range<usize>,
    out: &mut [E],
) {
    let Shape { rows, stages, dims, .. } = shape;
    let (group, stage) = (book / stages, book % stages);
    let chosen = |row: usize| {
        let k = indices[(group * rows + row) * stages + stage];
        usize::try_from(k).ok().filter(|k| wanted.contains(k)).map(|k| k - wanted.start)
    };
    // A counting sort: the rows of every code, in order.
    let mut ends = vec![0; wanted.len() + 1];
    (0..rows).filter_map(chosen).for_each(|k| ends[k + 1] += 1);
    for k in 0..wanted.len() {
        ends[k + 1] += ends[k];
    }
    let mut order = vec![0; ends[wanted.len()]];
    let mut next = ends.clone();
    for row in 0..rows {
        if let Some(k) = chosen(row) {
            order[next[k]] = group * rows + row;
            next[k] += 1;
        }
    }
    let mut sums = vec![0.0; dims];
    for (ends, out) in ends.windows(2).zip(out.chunks_exact_mut(dims)) {
        sums.fill(0.0);
        for &row in &order[ends[0]..ends[1]] {
            let of_row = &of_quantized[row * dims..][..dims];
            sums.iter_mut().zip(of_row).for_each(|(sum, value)| *sum += value.wide());
            if !of_codes.is_empty() {
                let of_row = &of_codes[(row * stages + stage) * dims..][..dims];
                sums.iter_mut().zip(of_row).for_each(|(sum, value)| *sum += value.wide());
            }
        }
        out.iter_mut().zip(&sums).for_each(|(out, &sum)| *out = E::narrow(sum));
    }
}
