//! `discretized_logistic_log_prob`: the sum over d of the log of a logistic's mass on a level, and its gradients.
//!
//! See [`crate::logistic`] for the mass. As in [`crate::bernoulli_log_prob`] one logarithm is taken a block, of the
//! product of the masses' factors.

mod float64;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use float64::{Logistics64, discretized_logistic_log_prob_backward_f64, discretized_logistic_log_prob_f64};

use crate::logistic::{IN_ALL, Levels, PER_LANE};
use crate::simd::{self, Kernel, Lanes, Level, Two};
use crate::threads;
use crate::values::{Values, ValuesMut};
use crate::{Error, Result};

/// Numbers between two flushes into `f64`.
const BLOCK: usize = 352;
/// At least as many lanes as two vectors of any level have.
const MOST_LANES: usize = 32;
/// Elements that are worth a thread: some 100 us of work.
const GRAIN: usize = 1 << 16;
/// Levels at most: their ends are told apart in `f32`.
const MOST_LEVELS: usize = 1 << 16;
/// x, mean and log scale that add nothing: all the mass is on the lowest level.
const NOTHING: [f32; 3] = [-1.0, f32::NEG_INFINITY, 0.0];

const _: () = assert!(BLOCK <= IN_ALL && BLOCK.div_ceil(8) <= PER_LANE);

/// The numbers of all examples: x in [-1, 1], and as many means and logarithms of scales.
#[derive(Debug, Clone, Copy)]
pub struct Logistics<'a> {
    /// As long as the others, or a divisor: row r meets row r mod n.
    pub x: Values<'a>,
    /// The logistics' means.
    pub mean: Values<'a>,
    /// The logarithms of their scales.
    pub log_scale: Values<'a>,
    /// Levels, 2 to 65536.
    pub levels: usize,
    /// Numbers a row.
    pub columns: usize,
}

/// Writes one log-likelihood a row.
pub fn discretized_logistic_log_prob(data: Logistics, out: &mut [f32], threads: usize) -> Result<()> {
    discretized_logistic_log_prob_at(simd::level(), data, out, threads)
}

/// [`discretized_logistic_log_prob`] at a level of one's own choice.
pub fn discretized_logistic_log_prob_at(level: Level, data: Logistics, out: &mut [f32], threads: usize) -> Result<()> {
    check(data.x.len(), data.mean.len(), data.log_scale.len(), data.levels, data.columns, out.len())?;
    let mut rest = out;
    let tasks = pieces(rest.len(), data.columns, threads).map(|rows| {
        let out = rest.split_off_mut(..rows.len()).unwrap_or_default();
        move || simd::run(level, Forward { data, rows, out })
    });
    threads::run(tasks.collect());
    Ok(())
}

/// Writes the derivatives in the means and in the logarithms of the scales, times one number `grad` a row.
pub fn discretized_logistic_log_prob_backward(
    data: Logistics,
    grad: &[f32],
    out: [ValuesMut; 2],
    threads: usize,
) -> Result<()> {
    discretized_logistic_log_prob_backward_at(simd::level(), data, grad, out, threads)
}

/// [`discretized_logistic_log_prob_backward`] at a level of one's own choice.
pub fn discretized_logistic_log_prob_backward_at(
    level: Level,
    data: Logistics,
    grad: &[f32],
    out: [ValuesMut; 2],
    threads: usize,
) -> Result<()> {
    check(data.x.len(), data.mean.len(), data.log_scale.len(), data.levels, data.columns, grad.len())?;
    check_room([out[0].len(), out[1].len()], data.mean.len())?;
    let mut rest = Some(out);
    let tasks = pieces(grad.len(), data.columns, threads).filter_map(|rows| {
        let [mean, log_scale] = rest.take()?;
        let (mean, mean_tail) = mean.split_at_mut(rows.len() * data.columns);
        let (log_scale, log_scale_tail) = log_scale.split_at_mut(rows.len() * data.columns);
        rest = Some([mean_tail, log_scale_tail]);
        Some(move || simd::run(level, Backward { data, grad, rows, out: [mean, log_scale] }))
    });
    threads::run(tasks.collect());
    Ok(())
}

/// Whether the lengths agree: `rows * columns` parameters, x a whole number of rows that divides them.
fn check(x: usize, mean: usize, log_scale: usize, levels: usize, columns: usize, rows: usize) -> Result<()> {
    let whole = columns == 0 && x == 0 || columns > 0 && x > 0 && x.is_multiple_of(columns) && mean.is_multiple_of(x);
    if !(2..=MOST_LEVELS).contains(&levels) {
        return Err(Error::Argument(format!("discretized_logistic_log_prob: {levels} levels, expected 2 to 65536")));
    }
    if Some(mean) == rows.checked_mul(columns) && log_scale == mean && (whole || mean == 0) {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "discretized_logistic_log_prob: {mean} means, {log_scale} log scales and {x} values of x, expected {rows} rows \
         of {columns}, and for x a divisor of that"
    )))
}

fn check_room(room: [usize; 2], due: usize) -> Result<()> {
    if room == [due; 2] {
        return Ok(());
    }
    Err(Error::Argument(format!("discretized_logistic_log_prob: room for {room:?} of {due} gradients each")))
}

fn pieces(rows: usize, columns: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
    threads::pieces(rows, GRAIN.div_ceil(columns.max(1)), threads).into_iter()
}

struct Forward<'a> {
    data: Logistics<'a>,
    rows: Range<usize>,
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let mut scratch = [[0.0; BLOCK]; 3];
        let levels = Levels::<Two<V>>::new(self.data.levels);
        for (row, out) in self.rows.zip(self.out) {
            let (mut total, mut column) = (0.0, 0);
            while column < self.data.columns {
                let length = BLOCK.min(self.data.columns - column);
                total += block(&levels, self.data.block(row, column, length, &mut scratch));
                column += length;
            }
            *out = total as f32;
        }
    }
}

impl Logistics<'_> {
    /// x, mean and log scale of a piece of a row.
    #[inline(always)]
    fn block<'b>(
        &'b self,
        row: usize,
        column: usize,
        length: usize,
        scratch: &'b mut [[f32; BLOCK]; 3],
    ) -> [&'b [f32]; 3] {
        let start = row * self.columns + column;
        let [x, mean, log_scale] = scratch;
        [
            self.x.block(start % self.x.len(), length, x),
            self.mean.block(start, length, mean),
            self.log_scale.block(start, length, log_scale),
        ]
    }
}

/// The sum over at most `BLOCK` numbers.
#[inline(always)]
fn block<V: Lanes>(levels: &Levels<V>, [x, mean, log_scale]: [&[f32]; 3]) -> f64 {
    let (mean, log_scale) = (&mean[..x.len()], &log_scale[..x.len()]);
    let mut sums = [V::splat(0.0); 2];
    let mut at = 0;
    while at + V::COUNT <= x.len() {
        sums = add(levels, sums, [V::load(x, at), V::load(mean, at), V::load(log_scale, at)]);
        at += V::COUNT;
    }
    if at < x.len() {
        sums = add(levels, sums, tail([&x[at..], &mean[at..], &log_scale[at..]]));
    }
    total(sums)
}

/// Sums of the linear parts, and products of the factors minus 1, with those of some more numbers.
#[inline(always)]
fn add<V: Lanes>(levels: &Levels<V>, [linear, growth]: [V; 2], [x, mean, log_scale]: [V; 3]) -> [V; 2] {
    let cell = levels.cell(x);
    let factor = levels.factor(&cell, mean, log_scale);
    [linear.add(factor.linear), factor.growth.mul_add(growth, growth.add(factor.growth))]
}

/// The distances of a level's ends from the mean, in half levels.
#[inline(always)]
fn ends<V: Lanes>(levels: &Levels<V>, n: V, mean: V) -> (V, V) {
    let one = V::splat(1.0);
    (levels.distance(n.sub(one), mean), levels.distance(n.add(one), mean))
}

/// Fewer numbers than lanes, followed by some that add nothing.
#[inline(always)]
fn tail<V: Lanes>(values: [&[f32]; 3]) -> [V; 3] {
    let mut lanes = [V::splat(0.0); 3];
    let mut which = 0;
    while which < 3 {
        let mut padded = [NOTHING[which]; MOST_LANES];
        padded[..values[which].len()].copy_from_slice(values[which]);
        lanes[which] = V::load(&padded, 0);
        which += 1;
    }
    lanes
}

/// The sum of all lanes: linear parts, minus the logarithm of the product of all factors.
#[inline(always)]
fn total<V: Lanes>([linear, growth]: [V; 2]) -> f64 {
    let (mut linears, mut growths) = ([0.0; MOST_LANES], [0.0; MOST_LANES]);
    linear.store(&mut linears, 0);
    growth.store(&mut growths, 0);
    let (mut linear, mut growth, mut lane) = (0.0, 0.0, 0);
    while lane < V::COUNT {
        let more = f64::from(growths[lane]);
        linear += f64::from(linears[lane]);
        growth += more + growth * more;
        lane += 1;
    }
    linear - growth.ln_1p()
}

struct Backward<'a> {
    data: Logistics<'a>,
    grad: &'a [f32],
    rows: Range<usize>,
    out: [ValuesMut<'a>; 2],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let mut scratch = [[0.0; BLOCK]; 3];
        let mut slopes = [[0.0; BLOCK]; 2];
        let levels = Levels::<V>::new(self.data.levels);
        let first = self.rows.start;
        for row in self.rows {
            let grad = V::splat(self.grad[row]);
            let mut column = 0;
            while column < self.data.columns {
                let length = BLOCK.min(self.data.columns - column);
                let values = self.data.block(row, column, length, &mut scratch);
                let [mean, log_scale] = &mut slopes;
                block_slopes(&levels, grad, values, [&mut mean[..], &mut log_scale[..]]);
                let start = (row - first) * self.data.columns + column;
                self.out[0].write(start, &slopes[0][..length]);
                self.out[1].write(start, &slopes[1][..length]);
                column += length;
            }
        }
    }
}

/// grad times the derivatives, for at most `BLOCK` numbers.
#[inline(always)]
fn block_slopes<V: Lanes>(
    levels: &Levels<V>,
    grad: V,
    [x, mean, log_scale]: [&[f32]; 3],
    [d_mean, d_log_scale]: [&mut [f32]; 2],
) {
    let (mean, log_scale) = (&mean[..x.len()], &log_scale[..x.len()]);
    let mut at = 0;
    while at < x.len() {
        let values = if at + V::COUNT <= x.len() {
            [V::load(x, at), V::load(mean, at), V::load(log_scale, at)]
        } else {
            tail([&x[at..], &mean[at..], &log_scale[at..]])
        };
        let cell = levels.cell(values[0]);
        let (lower, upper) = ends(levels, cell.n, values[1]);
        let (of_mean, of_log_scale) = levels.parts(&cell, lower, upper, values[2]).slopes(&cell);
        // `BLOCK` is a multiple of every `COUNT`: there is room for the lanes of a tail too.
        grad.mul(of_mean).store(d_mean, at);
        grad.mul(of_log_scale).store(d_log_scale, at);
        at += V::COUNT;
    }
}
