//! The gradient: with Q = P o dP a table of each row, and S0, S1 the sums of Q over the codes in which a bit is 0, 1,
//! the derivative in slope x is p0 S1 - p1 S0.

use std::ops::Range;

use super::product::{STRIP, WIDEST_PANEL, panel, tile};
use super::real::{Real, Vector};
use super::tables::{bit, table_of_rows};
use super::{check, grain, halves};
use crate::simd::{self, Kernel, Lanes, Level};
use crate::threads;
use crate::{Error, Result};

/// Writes the gradient in x [N, bits] of the sum of weights [2^bits] times the mean distribution.
pub fn sign_code_mean_backward<T: Real>(
    x: &[T],
    weights: &[T],
    bits: usize,
    slope: f64,
    out: &mut [T],
    threads: usize,
) -> Result<()> {
    sign_code_mean_backward_at(simd::level(), x, weights, bits, slope, out, threads)
}

/// [`sign_code_mean_backward`] at a level of one's own choice.
pub fn sign_code_mean_backward_at<T: Real>(
    level: Level,
    x: &[T],
    weights: &[T],
    bits: usize,
    slope: f64,
    out: &mut [T],
    threads: usize,
) -> Result<()> {
    check(x.len(), bits, weights.len())?;
    if out.len() != x.len() {
        return Err(Error::Argument(format!("sign_code_mean: room for {} of {} gradients", out.len(), x.len())));
    }
    let (high, low) = halves(bits);
    let (rows, columns) = (1_usize << high, 1_usize << low);
    let first = strips(rows, columns, |row, column| weights[row * columns + column]);
    let second = strips(columns, rows, |column, row| weights[row * columns + column]);
    let mut left = out;
    let tasks = threads::pieces(x.len() / bits, grain(bits), threads).into_iter().map(|range| {
        let out = left.split_off_mut(..range.len() * bits).unwrap_or_default();
        let factors = [&first[..], &second[..]];
        move || simd::run(level, Backward { x, bits, slope, factors, range, out })
    });
    threads::run(tasks.collect());
    Ok(())
}

/// A matrix [rows, columns] as [rows / STRIP, columns, STRIP], the last strip filled up with zeros.
fn strips<T: Real>(rows: usize, columns: usize, at: impl Fn(usize, usize) -> T) -> Vec<T> {
    let mut packed = vec![T::ZERO; rows.next_multiple_of(STRIP) * columns];
    for (number, strip) in packed.chunks_mut(columns * STRIP).enumerate() {
        for (column, values) in strip.chunks_mut(STRIP).enumerate() {
            for (row, value) in (number * STRIP..rows).zip(values) {
                *value = at(row, column);
            }
        }
    }
    packed
}

struct Backward<'a, T> {
    x: &'a [T],
    bits: usize,
    slope: f64,
    factors: [&'a [T]; 2],
    range: Range<usize>,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let bits = self.bits;
        let panel = panel::<T::Vector<V>>();
        let (high, low) = halves(bits);
        let mut probabilities = vec![T::ZERO; bits * 2 * panel];
        let mut tables = [vec![T::ZERO; panel << high], vec![T::ZERO; panel << low]];
        let mut products = vec![T::ZERO; (1_usize << low).next_multiple_of(STRIP) * panel];
        let mut slopes = vec![T::ZERO; bits * panel];
        let scale = self.slope / (self.x.len() / bits) as f64;
        let mut first = self.range.start;
        while first < self.range.end {
            let count = panel.min(self.range.end - first);
            let mut lane = 0;
            while lane < panel {
                let mut i = 0;
                while i < bits {
                    let x = if lane < count { self.x[(first + lane) * bits + i] } else { T::ZERO };
                    let [zero, one] = bit(x, self.slope);
                    probabilities[2 * i * panel + lane] = zero;
                    probabilities[(2 * i + 1) * panel + lane] = one;
                    i += 1;
                }
                lane += 1;
            }
            let (before, after) = probabilities.split_at(2 * high * panel);
            table_of_rows::<T::Vector<V>>(before, panel, &mut tables[0]);
            table_of_rows::<T::Vector<V>>(after, panel, &mut tables[1]);
            let (head, tail) = slopes.split_at_mut(high * panel);
            let [one, two] = &tables;
            multiply::<T::Vector<V>>(self.factors[0], two, one, &mut products);
            fold::<T::Vector<V>>(&mut products, before, head);
            multiply::<T::Vector<V>>(self.factors[1], one, two, &mut products);
            fold::<T::Vector<V>>(&mut products, after, tail);
            let mut lane = 0;
            while lane < count {
                let out = &mut self.out[(first - self.range.start + lane) * bits..][..bits];
                let mut i = 0;
                while i < bits {
                    out[i] = T::round(slopes[i * panel + lane].double() * scale);
                    i += 1;
                }
                lane += 1;
            }
            first += panel;
        }
    }
}

/// out[i][n] = table[i][n] times the sum over k of factors[i][k] right[k][n], `panel` rows n side by side.
#[inline(always)]
fn multiply<V: Vector>(factors: &[V::Scalar], right: &[V::Scalar], table: &[V::Scalar], out: &mut [V::Scalar]) {
    let panel = panel::<V>();
    let depth = right.len() / panel;
    let mut sums = [V::Scalar::ZERO; STRIP * WIDEST_PANEL];
    let mut at = 0;
    while at < table.len() {
        tile::<V>(&factors[at / panel * depth..][..depth * STRIP], right, depth, &mut sums);
        let end = table.len().min(at + STRIP * panel);
        let mut i = at;
        while i < end {
            V::load(table, i).mul(V::load(&sums, i - at)).store(out, i);
            i += V::COUNT;
        }
        at = end;
    }
}

/// slopes[i][n] = p0 S1 - p1 S0 of bit i, from products [2^bits, panel], which it folds bit by bit.
#[inline(always)]
fn fold<V: Vector>(products: &mut [V::Scalar], probabilities: &[V::Scalar], slopes: &mut [V::Scalar]) {
    let panel = panel::<V>();
    let bits = slopes.len() / panel;
    let mut i = 0;
    while i < bits {
        let half = panel << (bits - 1 - i);
        let mut at = 0;
        while at < panel {
            let (mut zero, mut one) = (V::splat(V::Scalar::ZERO), V::splat(V::Scalar::ZERO));
            let mut c = at;
            while c < half {
                let (low, high) = (V::load(products, c), V::load(products, half + c));
                (zero, one) = (zero.add(low), one.add(high));
                low.add(high).store(products, c);
                c += panel;
            }
            let (p0, p1) =
                (V::load(probabilities, 2 * i * panel + at), V::load(probabilities, (2 * i + 1) * panel + at));
            p0.mul(one).sub(p1.mul(zero)).store(slopes, i * panel + at);
            at += V::COUNT;
        }
        i += 1;
    }
}
