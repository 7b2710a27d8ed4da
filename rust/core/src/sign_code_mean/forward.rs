//! The mean distribution: the product of the two tables of all rows, added up in `f64`.

use std::ops::Range;

use super::product::{STRIP, WIDEST_PANEL, panel, tile};
use super::real::Real;
use super::tables::{bit, table_of_row};
use super::{MOST_BITS, check, grain, halves};
use crate::Result;
use crate::simd::{self, Kernel, Lanes, Level};
use crate::threads;

/// Rows that are summed in the element type before their sum joins the totals: their tables' panels fit a first cache.
const DEPTH: usize = 128;
/// Blocks of that many rows whose tables are in memory at a time.
const BLOCKS: usize = 8;

/// Writes the mean over the rows x [N, bits] of prod over i of sigmoid(+-slope x_i), [2^bits]; 0 without rows.
pub fn sign_code_mean<T: Real>(x: &[T], bits: usize, slope: f64, out: &mut [T], threads: usize) -> Result<()> {
    sign_code_mean_at(simd::level(), x, bits, slope, out, threads)
}

/// [`sign_code_mean`] at a level of one's own choice.
pub fn sign_code_mean_at<T: Real>(
    level: Level,
    x: &[T],
    bits: usize,
    slope: f64,
    out: &mut [T],
    threads: usize,
) -> Result<()> {
    check(x.len(), bits, out.len())?;
    let (high, low) = halves(bits);
    let (strips, columns) = ((1_usize << high).div_ceil(STRIP), (1_usize << low).next_multiple_of(WIDEST_PANEL));
    let length = DEPTH * (strips * STRIP + columns);
    let rows = x.len() / bits;
    let mut tables = vec![T::ZERO; length * BLOCKS.min(rows.div_ceil(DEPTH))];
    let mut totals = vec![0.0; strips * STRIP * columns];
    let mut first = 0;
    while first < rows {
        let last = rows.min(first + BLOCKS * DEPTH);
        let chunk = &x[first * bits..last * bits];
        let count = (last - first).div_ceil(DEPTH);
        let mut left = &mut tables[..];
        let build = threads::pieces(count, grain(bits).div_ceil(DEPTH), threads).into_iter().map(|blocks| {
            let tables = left.split_off_mut(..blocks.len() * length).unwrap_or_default();
            move || simd::run(level, Build { chunk, bits, slope, blocks, tables, strips, columns })
        });
        threads::run(build.collect());
        let (mut left, tables) = (&mut totals[..], &tables[..]);
        let depth = last - first;
        let multiply =
            threads::pieces(strips, (grain(bits) * strips).div_ceil(depth), threads).into_iter().map(|range| {
                let totals = left.split_off_mut(..range.len() * STRIP * columns).unwrap_or_default();
                move || simd::run(level, Multiply { tables, depth, range, totals, strips, columns })
            });
        threads::run(multiply.collect());
        first = last;
    }
    let scale = 1.0 / rows.max(1) as f64;
    for (row, out) in out.chunks_mut(1 << low).enumerate() {
        for (out, total) in out.iter_mut().zip(&totals[row * columns..]) {
            *out = T::round(total * scale);
        }
    }
    Ok(())
}

/// Tables of blocks of rows: of each block, left [strips, DEPTH, STRIP] and then right [panels, DEPTH, panel].
struct Build<'a, T> {
    chunk: &'a [T],
    bits: usize,
    slope: f64,
    blocks: Range<usize>,
    tables: &'a mut [T],
    strips: usize,
    columns: usize,
}

impl<T: Real> Kernel for Build<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let panel = panel::<T::Vector<V>>();
        let (high, low) = halves(self.bits);
        let mut table = [T::ZERO; 1 << MOST_BITS.div_ceil(2)];
        let mut probabilities = [[T::ZERO; 2]; MOST_BITS];
        let length = DEPTH * (self.strips * STRIP + self.columns);
        let rows = self.chunk.len() / self.bits;
        let start = self.blocks.start;
        let mut row = start * DEPTH;
        while row < rows.min(self.blocks.end * DEPTH) {
            let mut i = 0;
            while i < self.bits {
                probabilities[i] = bit(self.chunk[row * self.bits + i], self.slope);
                i += 1;
            }
            let block = &mut self.tables[(row / DEPTH - start) * length..][..length];
            let (left, right) = block.split_at_mut(DEPTH * self.strips * STRIP);
            table_of_row(&probabilities[..high], &mut table[..1 << high]);
            scatter(&table[..1 << high], STRIP, row % DEPTH, left);
            table_of_row(&probabilities[high..self.bits], &mut table[..1 << low]);
            scatter(&table[..1 << low], panel, row % DEPTH, right);
            row += 1;
        }
    }
}

/// Writes a row's table into row `row` of groups of `width` columns, each [DEPTH, width].
#[inline(always)]
fn scatter<T: Real>(table: &[T], width: usize, row: usize, out: &mut [T]) {
    let mut c = 0;
    while c < table.len() {
        let end = table.len().min(c + width);
        out[c * DEPTH + row * width..][..end - c].copy_from_slice(&table[c..end]);
        c = end;
    }
}

/// Adds the products of all blocks to some strips of the totals [strips, STRIP, columns].
struct Multiply<'a, T> {
    tables: &'a [T],
    depth: usize,
    range: Range<usize>,
    totals: &'a mut [f64],
    strips: usize,
    columns: usize,
}

impl<T: Real> Kernel for Multiply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let panel = panel::<T::Vector<V>>();
        let length = DEPTH * (self.strips * STRIP + self.columns);
        let mut sums = [T::ZERO; STRIP * WIDEST_PANEL];
        let mut row = 0;
        while row < self.depth {
            let depth = DEPTH.min(self.depth - row);
            let (left, right) = self.tables[row / DEPTH * length..][..length].split_at(DEPTH * self.strips * STRIP);
            let mut column = 0;
            while column < self.columns {
                let right = &right[column * DEPTH..][..DEPTH * panel];
                let mut strip = self.range.start;
                while strip < self.range.end {
                    tile::<T::Vector<V>>(&left[strip * DEPTH * STRIP..][..DEPTH * STRIP], right, depth, &mut sums);
                    let totals = &mut self.totals[(strip - self.range.start) * STRIP * self.columns..];
                    let mut i = 0;
                    while i < STRIP {
                        let totals = &mut totals[i * self.columns + column..][..panel];
                        let sums = &sums[i * panel..][..panel];
                        let mut j = 0;
                        while j < panel {
                            totals[j] += sums[j].double();
                            j += 1;
                        }
                        i += 1;
                    }
                    strip += 1;
                }
                column += panel;
            }
            row += DEPTH;
        }
    }
}
