//! `bernoulli_log_prob`: sum over d of x l - max(l, 0) - log(1 + exp(-|l|)), and its gradient.
//!
//! The logarithm is taken once a block, of the product of its factors: each lies in (1, 2], so that a lane of `f32`
//! holds 120 of them and an `f64` holds the 960 of a block. What is kept is the product minus 1, which loses nothing
//! when all exponentials are tiny. Everything summed has the same sign for x in [0, 1], so the result's relative
//! error is no more than its parts'.

mod float64;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use float64::{bernoulli_log_prob_backward_f64, bernoulli_log_prob_f64};

use crate::simd::{self, Kernel, Lanes, Level, exp_negative_abs};
use crate::threads;
use crate::values::{Values, ValuesMut};
use crate::{Error, Result};

/// Logits between two flushes into `f64`: a multiple of every `CHAINS * COUNT`, at most 127 a lane and 1023 in all.
const BLOCK: usize = 960;
/// Independent sums, which hide the latency of the additions.
const CHAINS: usize = 4;
/// At least as many lanes as any level has.
const MOST_LANES: usize = 16;
/// Elements that are worth a thread: some 70 us of work, which starting one costs.
const GRAIN: usize = 1 << 18;
/// A logit that adds nothing: its exponential is 0, and so is its product with x = 0.
const NOTHING: f32 = -1e3;

/// Writes one log-likelihood a row of `columns` logits; x has as many rows, or a divisor: row r meets row r mod n.
pub fn bernoulli_log_prob(logits: Values, x: Values, columns: usize, out: &mut [f32], threads: usize) -> Result<()> {
    bernoulli_log_prob_at(simd::level(), logits, x, columns, out, threads)
}

/// [`bernoulli_log_prob`] at a level of one's own choice.
pub fn bernoulli_log_prob_at(
    level: Level,
    logits: Values,
    x: Values,
    columns: usize,
    out: &mut [f32],
    threads: usize,
) -> Result<()> {
    check(logits.len(), x.len(), columns, out.len())?;
    let mut rest = out;
    let tasks = pieces(rest.len(), columns, threads).map(|rows| {
        let out = rest.split_off_mut(..rows.len()).unwrap_or_default();
        move || simd::run(level, Forward { logits, x, columns, rows, out })
    });
    threads::run(tasks.collect());
    Ok(())
}

/// Writes grad (x - sigmoid(l)), with one number `grad` a row.
pub fn bernoulli_log_prob_backward(
    logits: Values,
    x: Values,
    grad: &[f32],
    columns: usize,
    out: ValuesMut,
    threads: usize,
) -> Result<()> {
    bernoulli_log_prob_backward_at(simd::level(), logits, x, grad, columns, out, threads)
}

/// [`bernoulli_log_prob_backward`] at a level of one's own choice.
pub fn bernoulli_log_prob_backward_at(
    level: Level,
    logits: Values,
    x: Values,
    grad: &[f32],
    columns: usize,
    out: ValuesMut,
    threads: usize,
) -> Result<()> {
    check(logits.len(), x.len(), columns, grad.len())?;
    if out.len() != logits.len() {
        return Err(Error::Argument(format!(
            "bernoulli_log_prob: room for {} of {} gradients",
            out.len(),
            logits.len()
        )));
    }
    let mut rest = Some(out);
    let tasks = pieces(grad.len(), columns, threads).filter_map(|rows| {
        let (out, tail) = rest.take()?.split_at_mut(rows.len() * columns);
        rest = Some(tail);
        Some(move || simd::run(level, Backward { logits, x, grad, columns, rows, out }))
    });
    threads::run(tasks.collect());
    Ok(())
}

/// Whether the lengths agree: `logits = rows * columns`, x a whole number of rows that divides them.
fn check(logits: usize, x: usize, columns: usize, rows: usize) -> Result<()> {
    let whole = columns == 0 && x == 0 || columns > 0 && x > 0 && x.is_multiple_of(columns) && logits.is_multiple_of(x);
    if Some(logits) == rows.checked_mul(columns) && (whole || logits == 0) {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "bernoulli_log_prob: {logits} logits and {x} values of x, expected {rows} rows of {columns}, and for x a divisor of that"
    )))
}

fn pieces(rows: usize, columns: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
    threads::pieces(rows, GRAIN.div_ceil(columns.max(1)), threads).into_iter()
}

struct Forward<'a> {
    logits: Values<'a>,
    x: Values<'a>,
    columns: usize,
    rows: Range<usize>,
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (mut logit_scratch, mut x_scratch) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (row, out) in self.rows.zip(self.out) {
            let (mut total, mut column) = (0.0, 0);
            while column < self.columns {
                let length = BLOCK.min(self.columns - column);
                let start = row * self.columns + column;
                let logits = self.logits.block(start, length, &mut logit_scratch);
                let x = self.x.block(start % self.x.len(), length, &mut x_scratch);
                let mut sum = block::<V, false>(logits, x);
                if sum.is_nan() {
                    sum = block::<V, true>(logits, x);
                }
                total += sum;
                column += length;
            }
            *out = total as f32;
        }
    }
}

/// The sum over at most `BLOCK` logits. `INFINITE` makes 0 times infinity 0, at the cost of two instructions.
#[inline(always)]
fn block<V: Lanes, const INFINITE: bool>(logits: &[f32], x: &[f32]) -> f64 {
    let x = &x[..logits.len()];
    let [mut a, mut b, mut c, mut d] = [Sums::<V>::new(); CHAINS];
    let mut at = 0;
    while at + CHAINS * V::COUNT <= logits.len() {
        a.add::<INFINITE>(logits, x, at);
        b.add::<INFINITE>(logits, x, at + V::COUNT);
        c.add::<INFINITE>(logits, x, at + 2 * V::COUNT);
        d.add::<INFINITE>(logits, x, at + 3 * V::COUNT);
        at += CHAINS * V::COUNT;
    }
    while at + V::COUNT <= logits.len() {
        a.add::<INFINITE>(logits, x, at);
        (a, b, c, d) = (b, c, d, a);
        at += V::COUNT;
    }
    if at < logits.len() {
        a.add::<INFINITE>(&padded(&logits[at..], NOTHING), &padded(&x[at..], 0.0), 0);
    }
    a.merge(b).merge(c.merge(d)).total()
}

/// The values, followed by `filler`.
#[inline(always)]
fn padded(values: &[f32], filler: f32) -> [f32; MOST_LANES] {
    let mut lanes = [filler; MOST_LANES];
    lanes[..values.len()].copy_from_slice(values);
    lanes
}

/// Lanes of sums over some logits.
#[derive(Clone, Copy)]
struct Sums<V> {
    /// The sum of x l - max(l, 0).
    linear: V,
    /// The product of 1 + exp(-|l|), minus 1.
    growth: V,
}

impl<V: Lanes> Sums<V> {
    #[inline(always)]
    fn new() -> Self {
        Self { linear: V::splat(0.0), growth: V::splat(0.0) }
    }

    #[inline(always)]
    fn add<const INFINITE: bool>(&mut self, logits: &[f32], x: &[f32], at: usize) {
        let (logits, x) = (V::load(logits, at), V::load(x, at));
        let error = x.sub(logits.step());
        self.linear = if INFINITE {
            self.linear.add(error.mul(logits).where_nonzero(error))
        } else {
            error.mul_add(logits, self.linear)
        };
        let factor = exp_negative_abs(logits);
        self.growth = factor.mul_add(self.growth, self.growth.add(factor));
    }

    #[inline(always)]
    fn merge(self, other: Self) -> Self {
        Self {
            linear: self.linear.add(other.linear),
            growth: self.growth.mul_add(other.growth, self.growth.add(other.growth)),
        }
    }

    #[inline(always)]
    fn total(self) -> f64 {
        let (mut linear, mut growth) = (doubles(self.linear), doubles(self.growth));
        let mut half = V::COUNT / 2;
        while half > 0 {
            let mut lane = 0;
            while lane < half {
                linear[lane] += linear[lane + half];
                growth[lane] += growth[lane + half] + growth[lane] * growth[lane + half];
                lane += 1;
            }
            half /= 2;
        }
        linear[0] - growth[0].ln_1p()
    }
}

#[inline(always)]
fn doubles<V: Lanes>(lanes: V) -> [f64; MOST_LANES] {
    let mut values = [0.0; MOST_LANES];
    lanes.store(&mut values, 0);
    values.map(f64::from)
}

struct Backward<'a> {
    logits: Values<'a>,
    x: Values<'a>,
    grad: &'a [f32],
    columns: usize,
    rows: Range<usize>,
    out: ValuesMut<'a>,
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let (mut logit_scratch, mut x_scratch) = ([0.0; BLOCK], [0.0; BLOCK]);
        let mut gradients = [0.0; BLOCK];
        let first = self.rows.start;
        for row in self.rows {
            let grad = V::splat(self.grad[row]);
            let mut column = 0;
            while column < self.columns {
                let length = BLOCK.min(self.columns - column);
                let start = row * self.columns + column;
                let logits = self.logits.block(start, length, &mut logit_scratch);
                let x = self.x.block(start % self.x.len(), length, &mut x_scratch);
                let gradients = &mut gradients[..length];
                slopes(grad, logits, x, gradients);
                self.out.write(start - first * self.columns, gradients);
                column += length;
            }
        }
    }
}

/// grad (x - sigmoid(l)) for every logit.
#[inline(always)]
fn slopes<V: Lanes>(grad: V, logits: &[f32], x: &[f32], out: &mut [f32]) {
    let (x, out) = (&x[..logits.len()], &mut out[..logits.len()]);
    let mut at = 0;
    while at + V::COUNT <= logits.len() {
        slope(grad, V::load(logits, at), V::load(x, at)).store(out, at);
        at += V::COUNT;
    }
    let (logits, x) = (padded(&logits[at..], NOTHING), padded(&x[at..], 0.0));
    let mut lanes = [0.0; MOST_LANES];
    slope(grad, V::load(&logits, 0), V::load(&x, 0)).store(&mut lanes, 0);
    let rest = &mut out[at..];
    rest.copy_from_slice(&lanes[..rest.len()]);
}

#[inline(always)]
fn slope<V: Lanes>(grad: V, logits: V, x: V) -> V {
    let factor = exp_negative_abs(logits);
    let rest = factor.div(factor.add(V::splat(1.0)));
    grad.mul(x.sub(logits.step()).add(rest.copysign(logits)))
}
