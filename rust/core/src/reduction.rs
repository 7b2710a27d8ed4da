//! The skeleton of a log-likelihood of independent dimensions: rows of columns, a function of every element, row sums
//! in `f64`; and its gradients. A [`Density`] is the function.
//!
//! Everything is computed in `f64`, whatever is read: counts of thousands leave a logarithm of some units as the
//! difference of terms of thousands, and a residual over a small sigma is squared.

mod numbers;
#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;

pub use numbers::{Numbers, NumbersMut};

use crate::simd::special::ln_factorials;
use crate::simd::{self, Kernel, Lanes, Level};
use crate::threads;
use crate::{Error, Result};

/// Columns computed at a time: five blocks of them stay in the first-level cache.
const BLOCK: usize = 256;
/// Blocks are computed in whole groups of so many lanes.
const GROUP: usize = 16;
/// Elements that are worth a thread.
const GRAIN: usize = 1 << 14;

/// log p(x | first, second) of one element. One parameter: `second` is 0.
pub trait Density {
    /// The operation's name, for messages.
    const NAME: &'static str;
    /// Whether x are counts: [`Self::prepare`] is then given ln x!.
    const COUNTS: bool;
    /// Whether there is a second parameter.
    const TWO: bool;
    /// Whether there is something to [`Self::prepare`]; else 0 stands for it.
    const PREPARES: bool;
    /// Whether there is something to [`Self::prepare_slopes`]; else 0 stands for it.
    const PREPARES_SLOPES: bool;

    /// What depends on `second` alone: computed once for all rows that share it.
    fn parts<V: Lanes>(second: f64) -> Parts;
    /// What depends on x and `second`: computed once for all samples that share them.
    fn prepare<V: Lanes>(x: f64, second: Parts, ln_factorial: f64) -> f64;
    /// log p, given what is prepared.
    fn log_prob<V: Lanes>(x: f64, first: f64, second: Parts, prepared: f64) -> f64;
    /// What [`Self::slopes`] needs that depends on x and `second`.
    fn prepare_slopes<V: Lanes>(x: f64, second: Parts) -> f64;
    /// The derivatives of log p in `first` and in `second`.
    fn slopes<V: Lanes>(x: f64, first: f64, second: Parts, prepared: f64) -> (f64, f64);
}

/// What is computed of a second parameter.
pub type Parts = [f64; PARTS];
const PARTS: usize = 6;

/// -infinity for a NaN that comes from infinities alone, where what tends to -infinity wins.
#[inline(always)]
pub fn impossible_if_undefined(value: f64, x: f64, parameter: f64) -> f64 {
    if value.is_nan() && !x.is_nan() && !parameter.is_nan() { f64::NEG_INFINITY } else { value }
}

/// Rows of `width` numbers, of which row r of R meets row r mod n.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// n rows, one after the other.
    pub numbers: Numbers<'a>,
    /// As many as there are columns, or 1: the same number for all columns.
    pub width: usize,
}

impl Operand<'_> {
    /// A parameter that the density does not have.
    pub const NONE: Self = Self { numbers: Numbers::F64(&[0.0]), width: 1 };

    fn rows(&self) -> usize {
        self.numbers.len() / self.width.max(1)
    }
}

impl<'a> Operand<'a> {
    /// `length` columns from `column` on of row `row` of all, where they are whole rows of `f32`.
    #[inline(always)]
    fn single(&self, row: usize, column: usize, length: usize) -> Option<&'a [f32]> {
        let Numbers::F32(numbers) = self.numbers else { return None };
        let row = if self.rows() > row { row } else { row % self.rows() };
        numbers.get(row * self.width + column..row * self.width + column + length).filter(|_| self.width >= length)
    }
}

/// x and the parameters of R rows.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a> {
    /// The data.
    pub x: Operand<'a>,
    /// The first parameter.
    pub first: Operand<'a>,
    /// The second one, or [`Operand::NONE`].
    pub second: Operand<'a>,
    /// Of every row.
    pub columns: usize,
}

/// Writes one log-likelihood a row.
pub fn log_prob<D: Density>(operands: Operands, out: NumbersMut, threads: usize) -> Result<()> {
    log_prob_at::<D>(simd::level(), operands, out, threads)
}

/// [`log_prob`] at a level of one's own choice.
pub fn log_prob_at<D: Density>(level: Level, operands: Operands, out: NumbersMut, threads: usize) -> Result<()> {
    operands.check::<D>(out.len())?;
    let mut rest = Some(out);
    let tasks = operands.pieces(rest.as_ref().map_or(0, NumbersMut::len), threads).filter_map(|rows| {
        let (out, tail) = rest.take()?.split_at_mut(rows.len());
        rest = Some(tail);
        Some(move || simd::run(level, Forward::<D> { operands, rows, out, density: std::marker::PhantomData }))
    });
    threads::run(tasks.collect());
    Ok(())
}

/// Writes the gradients of the sum of `grad` times log-likelihood: in `first` for every element; in `second` for every
/// element, or where that has width 1 one sum for each of the R rows. `None` is not computed.
pub fn gradients<D: Density>(
    operands: Operands,
    grad: Numbers,
    first: Option<NumbersMut>,
    second: Option<NumbersMut>,
    threads: usize,
) -> Result<()> {
    gradients_at::<D>(simd::level(), operands, grad, first, second, threads)
}

/// [`gradients`] at a level of one's own choice.
pub fn gradients_at<D: Density>(
    level: Level,
    operands: Operands,
    grad: Numbers,
    first: Option<NumbersMut>,
    second: Option<NumbersMut>,
    threads: usize,
) -> Result<()> {
    let rows = grad.len();
    operands.check::<D>(rows)?;
    let width = operands.second.width;
    for (out, width) in [(&first, operands.columns), (&second, width)] {
        if let Some(out) = out
            && out.len() != rows * width
        {
            let room = out.len();
            return Err(Error::Argument(format!("{}: room for {room} of {} gradients", D::NAME, rows * width)));
        }
    }
    let (mut first, mut second) = (first, second);
    let tasks = operands.pieces(rows, threads).map(|rows| {
        let first = take(&mut first, rows.len() * operands.columns);
        let second = take(&mut second, rows.len() * width);
        move || {
            let density = std::marker::PhantomData;
            simd::run(level, Backward::<D> { operands, grad, rows, first, second, density });
        }
    });
    threads::run(tasks.collect());
    Ok(())
}

/// The first `count` numbers of the room, which keeps the others.
fn take<'a>(room: &mut Option<NumbersMut<'a>>, count: usize) -> Option<NumbersMut<'a>> {
    let (head, tail) = room.take()?.split_at_mut(count);
    *room = Some(tail);
    Some(head)
}

impl Operands<'_> {
    fn check<D: Density>(&self, rows: usize) -> Result<()> {
        let columns = self.columns;
        let fits = |operand: &Operand| {
            let (length, count) = (operand.numbers.len(), operand.rows());
            (operand.width == columns || operand.width == 1)
                && (rows * columns == 0 || (count > 0 && length == count * operand.width && rows.is_multiple_of(count)))
        };
        if fits(&self.x) && fits(&self.first) && fits(&self.second) {
            return Ok(());
        }
        Err(Error::Argument(format!(
            "{}: {} numbers of x, {} and {} of the parameters do not make {rows} rows of {columns}",
            D::NAME,
            self.x.numbers.len(),
            self.first.numbers.len(),
            self.second.numbers.len()
        )))
    }

    fn pieces(&self, rows: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
        threads::pieces(rows, GRAIN.div_ceil(self.columns.max(1)), threads).into_iter()
    }

    /// After how many rows what is prepared comes again.
    #[inline(always)]
    fn period(&self) -> usize {
        let (x, second) = (self.x.rows().max(1), self.second.rows().max(1));
        let (short, long) = if x < second { (x, second) } else { (second, x) };
        if long.is_multiple_of(short) { long } else { short * long }
    }
}

/// A block of an operand's row, in `f64`; keeps what it read last.
struct Block {
    values: [f64; BLOCK],
    holds: Option<(usize, usize)>,
}

impl Block {
    #[inline(always)]
    fn new() -> Self {
        Self { values: [0.0; BLOCK], holds: None }
    }

    /// `length` columns from `column` on of row `row` of all; whether they are others than before.
    #[inline(always)]
    fn read(&mut self, operand: &Operand, row: usize, column: usize, length: usize) -> bool {
        let row = if operand.rows() > row { row } else { row % operand.rows() };
        if self.holds == Some((row, column)) {
            return false;
        }
        self.holds = Some((row, column));
        if operand.width == 1 {
            self.values = [operand.numbers.get(row); BLOCK];
        } else {
            operand.numbers.read(row * operand.width + column, &mut self.values[..length]);
        }
        true
    }
}

/// A block of second parameters, and what was computed of it.
struct Seconds {
    block: Block,
    parts: [[f64; BLOCK]; PARTS],
}

impl Seconds {
    #[inline(always)]
    fn new() -> Self {
        Self { block: Block::new(), parts: [[0.0; BLOCK]; PARTS] }
    }

    #[inline(always)]
    fn read<V: Lanes, D: Density>(&mut self, operand: &Operand, row: usize, column: usize, length: usize) {
        if !self.block.read(operand, row, column, length) {
            return;
        }
        let (lanes, mut at) = (length.next_multiple_of(GROUP), 0);
        while at < lanes {
            let parts = D::parts::<V>(self.block.values[at]);
            let mut part = 0;
            while part < PARTS {
                self.parts[part][at] = parts[part];
                part += 1;
            }
            at += 1;
        }
    }

    #[inline(always)]
    fn get(&self, at: usize) -> Parts {
        let parts = &self.parts;
        [parts[0][at], parts[1][at], parts[2][at], parts[3][at], parts[4][at], parts[5][at]]
    }
}

struct Forward<'a, D> {
    operands: Operands<'a>,
    rows: Range<usize>,
    out: NumbersMut<'a>,
    density: std::marker::PhantomData<D>,
}

impl<D: Density> Kernel for Forward<'_, D> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let Operands { x, first, second, columns } = self.operands;
        let (mut xs, mut firsts, mut seconds) = (Block::new(), Block::new(), Seconds::new());
        let (mut factorials, mut prepared, mut values) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
        let (start, end) = (self.rows.start, self.rows.end);
        let period = self.operands.period();
        let mut totals = vec![0.0; end - start];
        let mut column = 0;
        while column < columns {
            let length = BLOCK.min(columns - column);
            let lanes = length.next_multiple_of(GROUP);
            let mut leader = start;
            while leader < end.min(start + period) {
                if D::PREPARES {
                    xs.read(&x, leader, column, length);
                    seconds.read::<V, D>(&second, leader, column, length);
                }
                if D::COUNTS {
                    ln_factorials::<V>(&xs.values[..lanes], length, &mut factorials[..lanes]);
                }
                let mut at = 0;
                while D::PREPARES && at < lanes {
                    prepared[at] = D::prepare::<V>(xs.values[at], seconds.get(at), factorials[at]);
                    at += 1;
                }
                let mut row = leader;
                while row < end {
                    seconds.read::<V, D>(&second, row, column, length);
                    let mut at = 0;
                    if let (Some(x), Some(first)) = (x.single(row, column, length), first.single(row, column, length)) {
                        // most often: read where they are
                        while at < length {
                            let (x, first) = (f64::from(x[at]), f64::from(first[at]));
                            values[at] = D::log_prob::<V>(x, first, seconds.get(at), prepared[at]);
                            at += 1;
                        }
                    } else {
                        xs.read(&x, row, column, length);
                        firsts.read(&first, row, column, length);
                        while at < lanes {
                            let (x, first) = (xs.values[at], firsts.values[at]);
                            values[at] = D::log_prob::<V>(x, first, seconds.get(at), prepared[at]);
                            at += 1;
                        }
                    }
                    totals[row - start] += sum(&mut values, length);
                    row += period;
                }
                leader += 1;
            }
            column += length;
        }
        self.out.write(0, &totals);
    }
}

/// The sum of the first `length` values; those behind are lost.
#[inline(always)]
fn sum(values: &mut [f64; BLOCK], length: usize) -> f64 {
    let lanes = length.next_multiple_of(GROUP);
    values[length..lanes].fill(0.0);
    let (mut sums, mut at) = ([0.0; GROUP], 0);
    while at < lanes {
        let mut lane = 0;
        while lane < GROUP {
            sums[lane] += values[at + lane];
            lane += 1;
        }
        at += GROUP;
    }
    let mut half = GROUP / 2;
    while half > 0 {
        let mut lane = 0;
        while lane < half {
            sums[lane] += sums[lane + half];
            lane += 1;
        }
        half /= 2;
    }
    sums[0]
}

struct Backward<'a, D> {
    operands: Operands<'a>,
    grad: Numbers<'a>,
    rows: Range<usize>,
    first: Option<NumbersMut<'a>>,
    second: Option<NumbersMut<'a>>,
    density: std::marker::PhantomData<D>,
}

impl<D: Density> Kernel for Backward<'_, D> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let Operands { x, first, second, columns } = self.operands;
        let (mut xs, mut firsts, mut seconds) = (Block::new(), Block::new(), Seconds::new());
        let mut prepared = [0.0; BLOCK];
        let (mut d_first, mut d_second) = ([0.0; BLOCK], [0.0; BLOCK]);
        let (start, end) = (self.rows.start, self.rows.end);
        let period = self.operands.period();
        let summed = second.width == 1 && columns != 1;
        let mut totals = vec![0.0; if summed { end - start } else { 0 }];
        let mut column = 0;
        while column < columns {
            let length = BLOCK.min(columns - column);
            let lanes = length.next_multiple_of(GROUP);
            let mut leader = start;
            while leader < end.min(start + period) {
                if D::PREPARES_SLOPES {
                    xs.read(&x, leader, column, length);
                    seconds.read::<V, D>(&second, leader, column, length);
                }
                let mut at = 0;
                while D::PREPARES_SLOPES && at < lanes {
                    prepared[at] = D::prepare_slopes::<V>(xs.values[at], seconds.get(at));
                    at += 1;
                }
                let mut row = leader;
                while row < end {
                    xs.read(&x, row, column, length);
                    seconds.read::<V, D>(&second, row, column, length);
                    firsts.read(&first, row, column, length);
                    let grad = self.grad.get(row);
                    let mut at = 0;
                    while at < lanes {
                        let (x, first, second) = (xs.values[at], firsts.values[at], seconds.get(at));
                        let slopes = D::slopes::<V>(x, first, second, prepared[at]);
                        d_first[at] = grad * slopes.0;
                        if D::TWO {
                            d_second[at] = grad * slopes.1;
                        }
                        at += 1;
                    }
                    if let Some(out) = &mut self.first {
                        out.write((row - start) * columns + column, &d_first[..length]);
                    }
                    if summed {
                        totals[row - start] += sum(&mut d_second, length);
                    } else if let Some(out) = &mut self.second {
                        out.write((row - start) * columns + column, &d_second[..length]);
                    }
                    row += period;
                }
                leader += 1;
            }
            column += length;
        }
        if summed && let Some(out) = &mut self.second {
            out.write(0, &totals);
        }
    }
}
