//! `code_logsumexp`: log of the sum over all codes of exp(-distance / temperature), and the softmax it normalises, a
//! block at a time.

use std::ops::Range;

use crate::code_scores::{Codes, PANEL, Scoring, Shape, Sink, scan};
use crate::nearest_code::Metric;
use crate::simd::{self, Kernel, Lanes, Level, exp_negative_abs};
use crate::{Error, Result, threads};

/// Scores that are worth a thread.
const GRAIN: usize = 1 << 18;

/// Writes log sum_k exp(-distance(x, codebook[k]) / temperature + bias[k]) of x [H, N, D] to out [H, N], with codebook
/// [H, K, D] and bias [H, K], each 0 or -infinity. Everything else is finite. -infinity where every code is left out.
pub fn code_logsumexp(
    x: &[f32],
    codebook: &[f32],
    bias: &[f32],
    shape: Shape,
    scoring: Scoring,
    out: &mut [f32],
    threads: usize,
) -> Result<()> {
    code_logsumexp_at(simd::level(), x, codebook, bias, shape, scoring, out, threads)
}

/// [`code_logsumexp`] at a level of one's own choice.
pub fn code_logsumexp_at(
    level: Level,
    x: &[f32],
    codebook: &[f32],
    bias: &[f32],
    shape: Shape,
    scoring: Scoring,
    out: &mut [f32],
    threads: usize,
) -> Result<()> {
    shape.check("code_logsumexp", x.len(), codebook.len(), bias.len(), out.len())?;
    let Shape { rows, codes, dims, .. } = shape;
    if rows == 0 {
        return Ok(());
    }
    for (head, out) in out.chunks_exact_mut(rows).enumerate() {
        let packed = Codes::new(&codebook[head * codes * dims..][..codes * dims], &bias[head * codes..][..codes], dims);
        let x = &x[head * rows * dims..][..rows * dims];
        let mut rest = out;
        let tasks = pieces(rows, codes, threads).map(|range| {
            let out = rest.split_off_mut(..range.len()).unwrap_or_default();
            let (x, codes) = (&x[range.start * dims..range.end * dims], &packed);
            move || simd::run(level, Forward { scoring, x, codes, out })
        });
        threads::run(tasks.collect());
    }
    Ok(())
}

/// Writes the probabilities exp(score - lse) of x [N, D] and codebook [K, D] to `probabilities` [N, K], 0 where the
/// row's lse is not finite; and, unless `slopes` is empty, each divided by the (Euclidean) distance, 0 at distance 0.
pub fn code_probabilities(
    x: &[f32],
    codebook: &[f32],
    bias: &[f32],
    lse: &[f32],
    shape: Shape,
    scoring: Scoring,
    probabilities: &mut [f32],
    slopes: &mut [f32],
    threads: usize,
) -> Result<()> {
    code_probabilities_at(simd::level(), x, codebook, bias, lse, shape, scoring, probabilities, slopes, threads)
}

/// [`code_probabilities`] at a level of one's own choice.
pub fn code_probabilities_at(
    level: Level,
    x: &[f32],
    codebook: &[f32],
    bias: &[f32],
    lse: &[f32],
    shape: Shape,
    scoring: Scoring,
    probabilities: &mut [f32],
    slopes: &mut [f32],
    threads: usize,
) -> Result<()> {
    let Shape { heads, rows, codes, dims } = shape;
    shape.check("code_probabilities", x.len(), codebook.len(), bias.len(), lse.len())?;
    let size = rows * codes;
    let room = probabilities.len() == size && (slopes.is_empty() || slopes.len() == size);
    if heads != 1 || !room || !(slopes.is_empty() || scoring.metric == Metric::Euclidean) {
        return Err(Error::Argument(format!(
            "code_probabilities: {} probabilities and {} slopes ({:?}), expected {rows} rows of {codes} of one head",
            probabilities.len(),
            slopes.len(),
            scoring.metric
        )));
    }
    let packed = Codes::new(codebook, bias, dims);
    let (mut rest, mut slope_rest) = (probabilities, slopes);
    let tasks = pieces(rows, codes, threads).map(|range| {
        let probabilities = rest.split_off_mut(..range.len() * codes).unwrap_or_default();
        let slopes = slope_rest.split_off_mut(..range.len() * codes).unwrap_or_default();
        let x = &x[range.start * dims..range.end * dims];
        let (codes, lse) = (&packed, &lse[range]);
        move || simd::run(level, Softmax { scoring, x, codes, lse, probabilities, slopes })
    });
    threads::run(tasks.collect());
    Ok(())
}

fn pieces(rows: usize, codes: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
    threads::pieces(rows, GRAIN.div_ceil(codes), threads).into_iter()
}

struct Forward<'a> {
    scoring: Scoring,
    x: &'a [f32],
    codes: &'a Codes,
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let bias = &self.codes.bias;
        let running = vec![(f32::NEG_INFINITY, 0.0); self.out.len()];
        let mut sums = Sums { scoring: self.scoring, bias, running };
        scan::<V, _>(self.scoring, self.x, self.codes, &mut sums);
        for (out, (largest, sum)) in self.out.iter_mut().zip(sums.running) {
            *out = (f64::from(largest) + sum.ln()) as f32;
        }
    }
}

/// Each row's largest score so far, and the sum of exp(score - largest).
struct Sums<'a> {
    scoring: Scoring,
    bias: &'a [f32],
    running: Vec<(f32, f64)>,
}

impl Sink for Sums<'_> {
    #[inline(always)]
    fn take<V: Lanes>(&mut self, row: usize, first: usize, sums: &mut [f32]) {
        self.scoring.scores(sums, &self.bias[first..]);
        let (mut largest, mut total) = self.running[row];
        let peak = peak::<V>(sums);
        if peak > largest {
            total *= f64::from(largest - peak).exp();
            largest = peak;
        }
        if largest > f32::NEG_INFINITY {
            total += sum_of_exponentials::<V>(sums, largest);
        }
        self.running[row] = (largest, total);
    }
}

/// The largest score of whole panels.
#[inline(always)]
pub(crate) fn peak<V: Lanes>(scores: &[f32]) -> f32 {
    let mut peak = V::splat(f32::NEG_INFINITY);
    let mut at = 0;
    while at < scores.len() {
        peak = V::load(scores, at).at_least(peak);
        at += V::COUNT;
    }
    let mut lanes = [f32::NEG_INFINITY; PANEL];
    peak.store(&mut lanes, 0);
    let (mut lane, mut result) = (1, lanes[0]);
    while lane < V::COUNT {
        result = result.max(lanes[lane]);
        lane += 1;
    }
    result
}

#[inline(always)]
fn sum_of_exponentials<V: Lanes>(scores: &[f32], largest: f32) -> f64 {
    let shift = V::splat(largest);
    let mut totals = [V::splat(0.0); 4];
    let mut at = 0;
    while at < scores.len() {
        let mut vector = 0;
        while vector < 4 {
            let exponential = exp_negative_abs(V::load(scores, at + vector * V::COUNT).sub(shift));
            totals[vector] = totals[vector].add(exponential);
            vector += 1;
        }
        at += 4 * V::COUNT;
    }
    let mut lanes = [0.0; PANEL];
    totals[0].add(totals[1]).add(totals[2].add(totals[3])).store(&mut lanes, 0);
    let (mut lane, mut result) = (0, 0.0);
    while lane < V::COUNT {
        result += f64::from(lanes[lane]);
        lane += 1;
    }
    result
}

struct Softmax<'a> {
    scoring: Scoring,
    x: &'a [f32],
    codes: &'a Codes,
    lse: &'a [f32],
    probabilities: &'a mut [f32],
    slopes: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let (scoring, x, codes) = (self.scoring, self.x, self.codes);
        scan::<V, _>(scoring, x, codes, &mut self);
    }
}

impl Sink for Softmax<'_> {
    #[inline(always)]
    fn take<V: Lanes>(&mut self, row: usize, first: usize, sums: &mut [f32]) {
        let size = self.codes.len();
        let start = row * size + first;
        let count = sums.len().min(size - first);
        let lse = self.lse[row];
        let probabilities = &mut self.probabilities[start..start + count];
        let slopes = if self.slopes.is_empty() { &mut [][..] } else { &mut self.slopes[start..start + count] };
        if !lse.is_finite() {
            probabilities.fill(0.0);
            slopes.fill(0.0);
            return;
        }
        self.scoring.distances(sums);
        let bias = &self.codes.bias[first..first + sums.len()];
        let (factor, shift) = (V::splat(-self.scoring.inverse_temperature), V::splat(lse));
        let mut panel = 0;
        while panel < sums.len() {
            let mut lanes = [0.0; PANEL];
            let mut at = 0;
            while at < PANEL {
                let score = V::load(sums, panel + at).mul_add(factor, V::load(bias, panel + at)).sub(shift);
                // No score is above the log of the sum, but for rounding.
                exp_negative_abs(score).store(&mut lanes, at);
                at += V::COUNT;
            }
            let end = count.min(panel + PANEL);
            probabilities[panel..end].copy_from_slice(&lanes[..end - panel]);
            if !slopes.is_empty() {
                let mut at = 0;
                while at < PANEL {
                    let distance = sums[panel + at];
                    lanes[at] = if distance > 0.0 { lanes[at] / distance } else { 0.0 };
                    at += 1;
                }
                slopes[panel..end].copy_from_slice(&lanes[..end - panel]);
            }
            panel += PANEL;
        }
    }
}

#[cfg(test)]
mod tests;
