//! `categorical_log_prob`: the sum over positions of l_x - log(sum over classes of exp(l)), and its gradient.
//!
//! A row holds classes of positions: class c of position e is number c E + e. Exponentials of logits below the
//! position's largest are taken in the logits' precision and added in `f64`, where the largest adds exactly 1: so a
//! confident position keeps its small remainder.

mod source;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use source::{Classes, Logits};

use crate::reduction::{Numbers, NumbersMut};
use crate::simd::special::ln;
use crate::simd::{self, Kernel, Lanes, Level};
use crate::{Error, Result, threads};
use source::Real;

/// Positions, or classes of one position, computed at a time.
const BLOCK: usize = 256;
/// With fewer positions than this the classes of one are computed together.
const NARROW: usize = 16;
/// Logits that are worth a thread.
const GRAIN: usize = 1 << 15;

/// Of a row of logits.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// C
    pub classes: usize,
    /// E
    pub positions: usize,
}

/// Writes one log-likelihood a row; x has E classes for as many rows, or a divisor n: row r meets row r mod n.
///
/// # Errors
/// Lengths that do not agree, a class of x outside 0..C.
pub fn categorical_log_prob<S: Logits>(
    logits: S,
    x: Classes,
    shape: Shape,
    out: NumbersMut,
    threads: usize,
) -> Result<()> {
    categorical_log_prob_at(simd::level(), logits, x, shape, out, threads)
}

/// [`categorical_log_prob`] at a level of one's own choice.
pub fn categorical_log_prob_at<S: Logits>(
    level: Level,
    logits: S,
    x: Classes,
    shape: Shape,
    out: NumbersMut,
    threads: usize,
) -> Result<()> {
    let rows = out.len();
    check(logits.len(), x, shape, rows)?;
    let mut rest = Some(out);
    let tasks = pieces(rows, shape, threads).filter_map(|rows| {
        let (out, tail) = rest.take()?.split_at_mut(rows.len());
        rest = Some(tail);
        Some(move || simd::run(level, Forward { logits, x, shape, rows, out }))
    });
    threads::run(tasks.collect());
    Ok(())
}

/// Writes grad ([c = x] - softmax(l)_c), with one number `grad` a row.
///
/// # Errors
/// As [`categorical_log_prob`].
pub fn categorical_log_prob_backward<S: Logits>(
    logits: S,
    x: Classes,
    shape: Shape,
    grad: Numbers,
    out: NumbersMut,
    threads: usize,
) -> Result<()> {
    categorical_log_prob_backward_at(simd::level(), logits, x, shape, grad, out, threads)
}

/// [`categorical_log_prob_backward`] at a level of one's own choice.
pub fn categorical_log_prob_backward_at<S: Logits>(
    level: Level,
    logits: S,
    x: Classes,
    shape: Shape,
    grad: Numbers,
    out: NumbersMut,
    threads: usize,
) -> Result<()> {
    let (rows, room) = (grad.len(), out.len());
    check(logits.len(), x, shape, rows)?;
    if room != logits.len() {
        let due = logits.len();
        return Err(Error::Argument(format!("categorical_log_prob: room for {room} of {due} gradients")));
    }
    let mut rest = Some(out);
    let tasks = pieces(rows, shape, threads).filter_map(|rows| {
        let (out, tail) = rest.take()?.split_at_mut(rows.len() * shape.classes * shape.positions);
        rest = Some(tail);
        Some(move || simd::run(level, Backward { logits, x, shape, grad, rows, out }))
    });
    threads::run(tasks.collect());
    Ok(())
}

fn check(logits: usize, x: Classes, Shape { classes, positions }: Shape, rows: usize) -> Result<()> {
    let whole = rows * positions == 0
        || (x.len() > 0 && x.len().is_multiple_of(positions) && (rows * positions).is_multiple_of(x.len()));
    if logits != rows * classes * positions || !whole {
        return Err(Error::Argument(format!(
            "categorical_log_prob: {logits} logits and {} values of x, expected {rows} rows of {classes} classes and \
             {positions} positions",
            x.len()
        )));
    }
    match x.outside(classes) {
        Some(bad) if rows * positions > 0 => Err(Error::Argument(format!(
            "categorical_log_prob: x holds {bad}, expected classes from 0 to {}",
            classes as i64 - 1
        ))),
        _ => Ok(()),
    }
}

fn pieces(rows: usize, shape: Shape, threads: usize) -> impl Iterator<Item = Range<usize>> {
    threads::pieces(rows, GRAIN.div_ceil((shape.classes * shape.positions).max(1)), threads).into_iter()
}

/// What softmax needs of each position of a block: the largest logit, and the sum of exponentials of the logits less
/// that one.
struct Statistics<T> {
    most: [T; BLOCK],
    sums: [f64; BLOCK],
    /// Exponentials of the class in hand.
    terms: [T; BLOCK],
    scratch: [T; BLOCK],
}

impl<T: Real> Statistics<T> {
    #[inline(always)]
    fn new() -> Self {
        let zeros = [T::ZERO; BLOCK];
        Self { most: zeros, sums: [1.0; BLOCK], terms: zeros, scratch: zeros }
    }

    /// Of positions `block` of the row that begins at `start`.
    #[inline(always)]
    fn take<V: Lanes, S: Logits<Number = T>>(&mut self, logits: S, start: usize, shape: Shape, block: &Range<usize>) {
        if shape.positions < NARROW {
            self.take_narrow::<V, S>(logits, start, shape, block);
        } else {
            self.take_wide::<V, S>(logits, start, shape, block);
        }
        let mut at = 0;
        while at < block.len() {
            if !self.most[at].into().is_finite() {
                self.sums[at] = infinite(logits, start + block.start + at, shape, self.most[at].into());
            }
            at += 1;
        }
    }

    #[inline(always)]
    fn take_wide<V: Lanes, S: Logits<Number = T>>(
        &mut self,
        logits: S,
        start: usize,
        shape: Shape,
        block: &Range<usize>,
    ) {
        let length = block.len();
        let mut class = 0;
        while class < shape.classes {
            let values = logits.block(start + class * shape.positions + block.start, length, &mut self.scratch);
            let most = &mut self.most[..length];
            let mut at = 0;
            while at < length {
                most[at] = if class == 0 || values[at] > most[at] { values[at] } else { most[at] };
                at += 1;
            }
            class += 1;
        }
        self.sums[..length].fill(0.0);
        class = 0;
        while class < shape.classes {
            self.exponentials::<V, S>(logits, start + class * shape.positions + block.start, length);
            let (terms, sums) = (&self.terms[..length], &mut self.sums[..length]);
            let mut at = 0;
            while at < length {
                sums[at] += terms[at].into();
                at += 1;
            }
            class += 1;
        }
    }

    /// Exponentials of one class, `length` logits from `from` on, into `terms`.
    #[inline(always)]
    fn exponentials<V: Lanes, S: Logits<Number = T>>(&mut self, logits: S, from: usize, length: usize) {
        let values = logits.block(from, length, &mut self.scratch);
        let (terms, most) = (&mut self.terms[..length], &self.most[..length]);
        let mut at = 0;
        while at < length {
            terms[at] = values[at].less(most[at]);
            at += 1;
        }
        T::exp_negative::<V>(&mut self.terms[..length.next_multiple_of(NARROW)]);
    }

    #[inline(always)]
    fn take_narrow<V: Lanes, S: Logits<Number = T>>(
        &mut self,
        logits: S,
        start: usize,
        shape: Shape,
        block: &Range<usize>,
    ) {
        let mut at = 0;
        while at < block.len() {
            let first = start + block.start + at;
            let mut most = logits.get(first);
            let mut class = 0;
            while class < shape.classes {
                let length = BLOCK.min(shape.classes - class);
                let values = logits.strided(first, class, length, shape.positions, &mut self.scratch);
                most = largest(most, values);
                class += length;
            }
            let (mut sum, mut class) = (0.0, 0);
            while class < shape.classes {
                let length = BLOCK.min(shape.classes - class);
                let values = logits.strided(first, class, length, shape.positions, &mut self.scratch);
                let terms = &mut self.terms[..length];
                let mut lane = 0;
                while lane < length {
                    terms[lane] = values[lane].less(most);
                    lane += 1;
                }
                T::exp_negative::<V>(&mut self.terms[..length.next_multiple_of(NARROW)]);
                sum += total(&mut self.terms, length);
                class += length;
            }
            (self.most[at], self.sums[at]) = (most, sum);
            at += 1;
        }
    }
}

/// The largest of `most` and the values, 16 at a time; a NaN in `most` stays.
#[inline(always)]
fn largest<T: Real>(most: T, values: &[T]) -> T {
    let (mut lanes, mut at) = ([most; NARROW], 0);
    while at + NARROW <= values.len() {
        let chunk = &values[at..at + NARROW];
        let mut lane = 0;
        while lane < NARROW {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
            lane += 1;
        }
        at += NARROW;
    }
    let mut most = most;
    for &value in lanes.iter().chain(&values[at..]) {
        most = if value > most { value } else { most };
    }
    most
}

/// The sum of the first `length` terms in `f64`; those behind are lost.
#[inline(always)]
fn total<T: Real>(terms: &mut [T; BLOCK], length: usize) -> f64 {
    let padded = length.next_multiple_of(NARROW);
    terms[length..padded].fill(T::ZERO);
    let (mut sums, mut at) = ([0.0; NARROW], 0);
    while at < padded {
        let chunk = &terms[at..at + NARROW];
        let mut lane = 0;
        while lane < NARROW {
            sums[lane] += chunk[lane].into();
            lane += 1;
        }
        at += NARROW;
    }
    sums.iter().sum()
}

/// The sum at a position whose largest logit is not finite: how many are infinite, or NaN when none is more than
/// -infinity.
#[inline(never)]
fn infinite<S: Logits>(logits: S, first: usize, shape: Shape, most: f64) -> f64 {
    let values = (0..shape.classes).map(|class| logits.get(first + class * shape.positions).into());
    let sum = values.map(|value| term(value, most)).sum();
    if most == f64::NEG_INFINITY { f64::NAN } else { sum }
}

/// exp(value - most), infinities included.
fn term(value: f64, most: f64) -> f64 {
    difference(value, most).exp()
}

/// value - most, 0 for equal infinities.
#[inline(always)]
#[allow(clippy::float_cmp)]
fn difference(value: f64, most: f64) -> f64 {
    if value == most { 0.0 } else { value - most }
}

struct Forward<'a, S> {
    logits: S,
    x: Classes<'a>,
    shape: Shape,
    rows: Range<usize>,
    out: NumbersMut<'a>,
}

impl<S: Logits> Kernel for Forward<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let Shape { classes, positions } = self.shape;
        let (mut statistics, mut chosen) = (Statistics::<S::Number>::new(), [0; BLOCK]);
        let first = self.rows.start;
        for row in self.rows {
            let (start, mut total, mut at) = (row * classes * positions, 0.0, 0);
            let x_start = row * positions % self.x.len().max(1);
            while at < positions {
                let block = at..positions.min(at + BLOCK);
                statistics.take::<V, S>(self.logits, start, self.shape, &block);
                self.x.read(x_start + at, &mut chosen[..block.len()]);
                self.logits.gather(start + at, positions, &chosen[..block.len()], &mut statistics.terms);
                let mut lane = 0;
                while lane < block.len() {
                    let sum = statistics.sums[lane];
                    let below = difference(statistics.terms[lane].into(), statistics.most[lane].into());
                    // a NaN has no logarithm of its own here
                    statistics.sums[lane] = below - ln::<V>(sum) + sum * 0.0;
                    lane += 1;
                }
                total += self::total(&mut statistics.sums, block.len());
                at = block.end;
            }
            self.out.write(row - first, &[total]);
        }
    }
}

struct Backward<'a, S> {
    logits: S,
    x: Classes<'a>,
    shape: Shape,
    grad: Numbers<'a>,
    rows: Range<usize>,
    out: NumbersMut<'a>,
}

impl<S: Logits> Kernel for Backward<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let Shape { classes, positions } = self.shape;
        let mut statistics = Statistics::<S::Number>::new();
        let (first, mut slopes) = (self.rows.start, [0.0; BLOCK]);
        for row in self.rows.clone() {
            let (start, grad, mut at) = (row * classes * positions, self.grad.get(row), 0);
            let offset = start - first * classes * positions;
            while at < positions {
                let block = at..positions.min(at + BLOCK);
                statistics.take::<V, S>(self.logits, start, self.shape, &block);
                if positions < NARROW {
                    self.narrow::<V>(&mut statistics, start, offset, grad);
                } else {
                    let mut class = 0;
                    while class < classes {
                        let from = class * positions + at;
                        statistics.exponentials::<V, S>(self.logits, start + from, block.len());
                        let mut lane = 0;
                        while lane < block.len() {
                            slopes[lane] = -grad * (statistics.terms[lane].into() / statistics.sums[lane]);
                            lane += 1;
                        }
                        self.out.write(offset + from, &slopes[..block.len()]);
                        class += 1;
                    }
                }
                self.exact::<V>(&mut statistics, row, offset, grad, &block);
                at = block.end;
            }
        }
    }
}

impl<S: Logits> Backward<'_, S> {
    /// All classes of a few positions.
    #[inline(always)]
    fn narrow<V: Lanes>(&mut self, statistics: &mut Statistics<S::Number>, start: usize, offset: usize, grad: f64) {
        let Shape { classes, positions } = self.shape;
        let mut slopes = [0.0; BLOCK];
        for at in 0..positions {
            let (most, scale) = (statistics.most[at], -grad / statistics.sums[at]);
            let mut class = 0;
            while class < classes {
                let length = BLOCK.min(classes - class);
                let values = self.logits.strided(start + at, class, length, positions, &mut statistics.scratch);
                let mut lane = 0;
                while lane < length {
                    statistics.terms[lane] = values[lane].less(most);
                    lane += 1;
                }
                S::Number::exp_negative::<V>(&mut statistics.terms[..length.next_multiple_of(NARROW)]);
                lane = 0;
                while lane < length {
                    slopes[lane] = scale * statistics.terms[lane].into();
                    lane += 1;
                }
                if positions == 1 {
                    self.out.write(offset + class, &slopes[..length]);
                } else {
                    for (lane, &slope) in slopes[..length].iter().enumerate() {
                        self.out.write(offset + (class + lane) * positions + at, &[slope]);
                    }
                }
                class += length;
            }
        }
    }

    /// What the vectorised loop left inexact: the class of x, whose slope is 1 less its share, and infinite logits.
    #[inline(always)]
    fn exact<V: Lanes>(
        &mut self,
        statistics: &mut Statistics<S::Number>,
        row: usize,
        offset: usize,
        grad: f64,
        block: &Range<usize>,
    ) {
        let Shape { classes, positions } = self.shape;
        let (start, x_start) = (row * classes * positions + block.start, row * positions % self.x.len() + block.start);
        let (mut chosen, mut slopes) = ([0; BLOCK], [0.0; BLOCK]);
        let (length, at) = (block.len(), offset + block.start);
        self.x.read(x_start, &mut chosen[..length]);
        self.logits.gather(start, positions, &chosen[..length], &mut statistics.scratch);
        let mut lane = 0;
        while lane < length {
            statistics.terms[lane] = statistics.scratch[lane].less(statistics.most[lane]);
            lane += 1;
        }
        S::Number::exp_negative::<V>(&mut statistics.terms[..length.next_multiple_of(NARROW)]);
        lane = 0;
        while lane < length {
            // other classes' exponentials are never negative, rounding apart
            let rest = statistics.sums[lane] - statistics.terms[lane].into();
            slopes[lane] = grad * (if rest < 0.0 { 0.0 } else { rest } / statistics.sums[lane]);
            lane += 1;
        }
        self.out.scatter(at, positions, &chosen[..length], &slopes[..length]);
        lane = 0;
        while lane < length {
            let (most, sum) = (statistics.most[lane].into(), statistics.sums[lane]);
            if !most.is_finite() {
                for class in 0..classes {
                    let share = term(self.logits.get(start + class * positions + lane).into(), most) / sum;
                    let hit = if class == chosen[lane] { 1.0 } else { 0.0 };
                    self.out.write(at + class * positions + lane, &[grad * (hit - share)]);
                }
            }
            lane += 1;
        }
    }
}
