//! `sample_code`: a code of every row, drawn from softmax(-distance / temperature) by the Gumbel-max rule.
//!
//! The noise of a row and a code is a function of (key, code, head, row id): Philox counter (code / 4, head, row id low,
//! row id high), word code mod 4. Panels of codes that could not win with the largest noise there is draw none.

use crate::code_logsumexp::peak;
use crate::code_scores::{Codes, PANEL, Scoring, Shape, Sink, scan};
use crate::philox::{gumbel, philox};
use crate::simd::{self, Kernel, Lanes, Level};
use crate::{Error, Result, threads};

/// Scores that are worth a thread.
const GRAIN: usize = 1 << 16;
/// No noise is larger.
const LARGEST_NOISE: f32 = 22.9;

/// Where the noise comes from.
#[derive(Debug, Clone, Copy)]
pub struct Noise<'a> {
    /// The seed.
    pub key: u64,
    /// One a row [N], the same for every head.
    pub row_ids: &'a [i64],
}

/// Writes to out [H, N] the code with the largest -distance / temperature + bias + noise, ties to the lowest: of x
/// [H, N, D], codebook [H, K, D], bias [H, K], each 0 or -infinity. 0 where every code is left out.
pub fn sample_code(
    x: &[f32],
    codebook: &[f32],
    bias: &[f32],
    shape: Shape,
    scoring: Scoring,
    noise: Noise,
    out: &mut [i64],
    threads: usize,
) -> Result<()> {
    sample_code_at(simd::level(), x, codebook, bias, shape, scoring, noise, out, threads)
}

/// [`sample_code`] at a level of one's own choice.
pub fn sample_code_at(
    level: Level,
    x: &[f32],
    codebook: &[f32],
    bias: &[f32],
    shape: Shape,
    scoring: Scoring,
    noise: Noise,
    out: &mut [i64],
    threads: usize,
) -> Result<()> {
    shape.check("sample_code", x.len(), codebook.len(), bias.len(), out.len())?;
    let Shape { rows, codes, dims, .. } = shape;
    if noise.row_ids.len() != rows {
        return Err(Error::Argument(format!("sample_code: {} row ids for {rows} rows", noise.row_ids.len())));
    }
    if rows == 0 {
        return Ok(());
    }
    for (head, out) in out.chunks_exact_mut(rows).enumerate() {
        let packed = Codes::new(&codebook[head * codes * dims..][..codes * dims], &bias[head * codes..][..codes], dims);
        let x = &x[head * rows * dims..][..rows * dims];
        let mut rest = out;
        let pieces = threads::pieces(rows, GRAIN.div_ceil(codes), threads).into_iter();
        let tasks = pieces.map(|range| {
            let out = rest.split_off_mut(..range.len()).unwrap_or_default();
            let (x, codes) = (&x[range.start * dims..range.end * dims], &packed);
            let noise = Noise { row_ids: &noise.row_ids[range], ..noise };
            move || simd::run(level, Draw { scoring, x, codes, head: head as u32, noise, out })
        });
        threads::run(tasks.collect());
    }
    Ok(())
}

struct Draw<'a> {
    scoring: Scoring,
    x: &'a [f32],
    codes: &'a Codes,
    head: u32,
    noise: Noise<'a>,
    out: &'a mut [i64],
}

impl Kernel for Draw<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        self.out.fill(0);
        let best = vec![f32::NEG_INFINITY; self.out.len()];
        let (scoring, x, codes) = (self.scoring, self.x, self.codes);
        scan::<V, _>(scoring, x, codes, &mut Winners { draw: self, best });
    }
}

/// Each row's largest score so far with its noise; its code is in `draw.out`.
struct Winners<'a> {
    draw: Draw<'a>,
    best: Vec<f32>,
}

impl Sink for Winners<'_> {
    #[inline(always)]
    fn take<V: Lanes>(&mut self, row: usize, first: usize, sums: &mut [f32]) {
        let Draw { scoring, codes, head, noise, .. } = self.draw;
        scoring.scores(sums, &codes.bias[first..]);
        let mut best = self.best[row];
        let mut panel = 0;
        while panel < sums.len() {
            let scores = &mut sums[panel..panel + PANEL];
            if peak::<V>(scores) + LARGEST_NOISE > best {
                add_noise(noise.key, (first + panel) / 4, head, noise.row_ids[row], scores);
                let largest = peak::<V>(scores);
                if largest > best {
                    best = largest;
                    let mut code = 0;
                    while scores[code] < largest {
                        code += 1;
                    }
                    self.draw.out[row] = (first + panel + code) as i64;
                }
            }
            panel += PANEL;
        }
        self.best[row] = best;
    }
}

/// Adds to a panel of scores the noise of counters from `group` on.
#[inline(always)]
fn add_noise(key: u64, group: usize, head: u32, row_id: i64, scores: &mut [f32]) {
    let (low, high) = (row_id as u32, (row_id >> 32) as u32);
    let mut words = [[0; 4]; PANEL / 4];
    let mut at = 0;
    while at < PANEL / 4 {
        words[at] = philox(key, [(group + at) as u32, head, low, high]);
        at += 1;
    }
    let words = words.as_flattened();
    let scores = &mut scores[..PANEL];
    let mut at = 0;
    while at < PANEL {
        scores[at] += gumbel(words[at]);
        at += 1;
    }
}

#[cfg(test)]
mod tests;
