//! The fast passes over a chunk of rows: in float32, and in 16-bit integers.

use std::ops::Range;

use super::decide::{Undecided, above, among, least_of};
use super::exact;
use super::integer::{self, IntegerCodes};
use super::pairs::Pairs;
use super::scan::{MOST_ROWS, SPAN, scan};
use super::search::{Chunk, Head};
use super::sinks::{KNOWN, Keys, Smallest};
use super::vector::Floats;

/// 32-bit numbers of a block of codes that stays in the second-level cache while tiles of rows pass over it.
const BLOCK: usize = 64 * 1024;
/// Rows this many times longer than a usual one of their chunk do not decide how finely all are rounded.
const UNUSUAL: f64 = 4.0;

/// One row in so many says what is usual.
const SAMPLE: usize = 8;

/// Finds the nearest code of every row of a chunk that it is sure of, and lists the others.
pub(super) trait FastPass<T: Floats, const CODES: usize> {
    /// How many tiles to begin with, of `most`.
    fn tiles_at_first(&self, most: usize) -> usize;

    /// # Safety
    /// As [`super::vector::Vector`].
    unsafe fn run(&mut self, chunk: &Chunk, out: &mut [i64], undecided: &mut Vec<Undecided>);
}

/// The groups, in blocks.
#[inline(always)]
fn blocks<const CODES: usize>(steps: usize, groups: usize) -> impl Iterator<Item = Range<usize>> {
    let size = (BLOCK / (steps * CODES)).max(1);
    (0..groups).step_by(size).map(move |first| first..(first + size).min(groups))
}

/// In float32.
pub(super) struct FloatPass<T> {
    found: Vec<Smallest<T>>,
}

impl<T> FloatPass<T> {
    pub fn new() -> Self {
        Self { found: Vec::new() }
    }
}

impl<T: Floats, const CODES: usize> FastPass<T, CODES> for FloatPass<T> {
    fn tiles_at_first(&self, most: usize) -> usize {
        most
    }

    #[inline(always)]
    unsafe fn run(&mut self, chunk: &Chunk, out: &mut [i64], undecided: &mut Vec<Undecided>) {
        let Chunk { head, prepared, .. } = *chunk;
        let (dims, width) = (head.dims, SPAN * T::LANES);
        let tiles = chunk.len().div_ceil(width);
        self.found.clear();
        // SAFETY: the caller's promise; `packed` holds `tiles` tiles.
        unsafe {
            self.found.resize(tiles, Smallest::new());
            let (codes, bias) = (prepared.codes.as_ptr(), prepared.bias.as_ptr());
            for groups in blocks::<CODES>(dims, prepared.bias.len() / CODES) {
                for (tile, found) in self.found.iter_mut().enumerate() {
                    let rows = chunk.packed.as_ptr().add(tile * dims * width);
                    let mut state = *found;
                    scan::<T, CODES>(rows, dims, codes, bias, groups.clone(), &mut state);
                    *found = state;
                }
            }
        }
        for (tile, out) in out.chunks_mut(width).enumerate() {
            // SAFETY: the caller's promise.
            let [best, second, group] = unsafe { self.found[tile].winners() };
            for (lane, out) in out.iter_mut().enumerate() {
                let (row, error) = (tile * width + lane, chunk.errors[tile][lane]);
                let margin = 2.0 * error;
                if f64::from(second[lane]) - f64::from(best[lane]) > margin {
                    let group = group[lane].to_bits() as usize;
                    *out = among::<CODES>(head, prepared, group, &chunk.row(row, width, margin));
                } else {
                    undecided.push(Undecided { row, error, limit: above(best[lane], margin) });
                }
            }
        }
    }
}

/// In integers, until they leave too many rows undecided: then in float32.
pub(super) struct IntegerPass<'a, T: Pairs> {
    pub codes: Option<&'a IntegerCodes>,
    floats: FloatPass<T::Floats>,
    /// As those of the chunk, in pairs of dimensions, and the biases in their scale.
    packed: Vec<i32>,
    bias: Vec<i32>,
    margins: Vec<[i64; MOST_ROWS]>,
    found: Vec<Keys<T>>,
    norms: Vec<f64>,
}

impl<'a, T: Pairs> IntegerPass<'a, T> {
    pub fn new(codes: Option<&'a IntegerCodes>) -> Self {
        Self {
            codes,
            floats: FloatPass::new(),
            packed: Vec::new(),
            bias: Vec::new(),
            margins: Vec::new(),
            found: Vec::new(),
            norms: Vec::new(),
        }
    }

    /// The largest norm in the chunk that is not unusual.
    fn largest_norm(&mut self, chunk: &Chunk, width: usize) -> f64 {
        let usable = |row: &usize| chunk.errors[row / width][row % width].is_finite();
        let norm = |row: usize| chunk.norms[row / width][row % width];
        self.norms.clear();
        self.norms.extend((0..chunk.len()).step_by(SAMPLE).filter(usable).map(norm).filter(|&norm| norm > 0.0));
        let middle = self.norms.len() / 2;
        let limit = if self.norms.is_empty() {
            f64::INFINITY
        } else {
            *self.norms.select_nth_unstable_by(middle, f64::total_cmp).1 * UNUSUAL
        };
        (0..chunk.len()).map(norm).filter(|&norm| norm <= limit).fold(0.0, f64::max)
    }

    /// Rounds the rows of the chunk and the biases of the codes to integers.
    ///
    /// # Safety
    /// As [`super::vector::Vector`].
    #[inline(always)]
    unsafe fn round(&mut self, codes: &IntegerCodes, chunk: &Chunk) {
        let (dims, width) = (chunk.head.dims, SPAN * T::LANES);
        let size = dims.div_ceil(2) * width;
        let tiles = chunk.len().div_ceil(width);
        let scale = codes.row_scale(self.largest_norm(chunk, width));
        self.bias.resize(chunk.prepared.bias.len(), 0);
        codes.bias(&chunk.prepared.bias, scale, &mut self.bias);
        self.packed.resize(tiles * size, 0);
        self.margins.resize(tiles, [0; MOST_ROWS]);
        let rows = chunk.packed.chunks_exact(dims * width).zip(self.packed.chunks_exact_mut(size));
        for (tile, (rows, out)) in rows.enumerate() {
            // SAFETY: the caller's promise.
            let lost = unsafe { integer::round::<T>(rows, dims, scale, out) };
            let mut lane = 0;
            while lane < MOST_ROWS {
                let (norm, error) = (chunk.norms[tile][lane], chunk.errors[tile][lane]);
                self.margins[tile][lane] = codes.margin(scale, norm, lost[lane], error);
                lane += 1;
            }
        }
    }
}

impl<T: Pairs, const CODES: usize> FastPass<T::Floats, CODES> for IntegerPass<'_, T> {
    fn tiles_at_first(&self, most: usize) -> usize {
        // Few, to learn whether integers are of use.
        if self.codes.is_some() { 1 } else { most }
    }

    #[inline(always)]
    unsafe fn run(&mut self, chunk: &Chunk, out: &mut [i64], undecided: &mut Vec<Undecided>) {
        const { assert!(CODES == 8, "what `near` takes") };
        let Some(codes) = self.codes else {
            // SAFETY: the caller's promise.
            return unsafe { FastPass::<T::Floats, CODES>::run(&mut self.floats, chunk, out, undecided) };
        };
        let Chunk { head, prepared, .. } = *chunk;
        let (steps, width) = (head.dims.div_ceil(2), SPAN * T::LANES);
        let groups = prepared.bias.len() / CODES;
        let tiles = chunk.len().div_ceil(width);
        self.found.clear();
        // SAFETY: the caller's promise; `packed` holds `tiles` tiles.
        unsafe {
            self.round(codes, chunk);
            self.found.resize(tiles, Keys::new(codes.bits, codes.shift));
            for groups in blocks::<CODES>(steps, groups) {
                for (tile, found) in self.found.iter_mut().enumerate() {
                    let rows = self.packed.as_ptr().add(tile * steps * width);
                    let mut state = *found;
                    scan::<T, CODES>(rows, steps, codes.codes.as_ptr(), self.bias.as_ptr(), groups.clone(), &mut state);
                    *found = state;
                }
            }
        }
        let mut left = 0;
        let mut near = Vec::new();
        for (tile, out) in out.chunks_mut(width).enumerate() {
            // SAFETY: the caller's promise.
            let keys = unsafe { self.found[tile].store() };
            for (lane, out) in out.iter_mut().enumerate() {
                let (row, margin) = (tile * width + lane, self.margins[tile][lane]);
                let best = keys[0][lane];
                let certain = |rank: usize| i64::from(keys[rank][lane]) - i64::from(best) > margin;
                if !certain(KNOWN) {
                    let error = chunk.errors[tile][lane];
                    let group = codes.groups(best, groups).start;
                    let least = least_of::<CODES>(prepared, group, &chunk.row(row, width, 0.0));
                    undecided.push(Undecided { row, error, limit: above(least, 2.0 * error) });
                    left += usize::from(error.is_finite());
                    continue;
                }
                let limit = IntegerCodes::limit(best, margin);
                let rows = &self.packed[tile * steps * width + lane..];
                near.clear();
                let (mut rank, mut size, mut last) = (0, 0, 0);
                while rank == 0 || (rank < KNOWN && !certain(rank)) {
                    for group in codes.groups(keys[rank][lane], groups) {
                        // SAFETY: the caller's promise; the group is one of the scan's, and `near` takes 8 codes.
                        let bits = unsafe {
                            let (packed, bias) = (codes.codes.as_ptr(), self.bias.as_ptr());
                            let (packed, bias) = (packed.add(group * steps * CODES), bias.add(group * CODES));
                            T::near(rows.as_ptr(), width, packed, bias, steps, limit)
                        };
                        if bits != 0 {
                            size += bits.count_ones();
                            last = group * CODES + bits.trailing_zeros() as usize;
                            near.push((group, bits));
                        }
                    }
                    rank += 1;
                }
                *out = if size == 1 { last as i64 } else { exactly::<CODES>(chunk, row, &mut near) };
            }
        }
        if left * 4 > chunk.len() {
            self.codes = None;
        }
    }
}

/// The nearest of those codes of some groups whose bits are set, in float64.
fn exactly<const CODES: usize>(chunk: &Chunk, row: usize, near: &mut Vec<(usize, u32)>) -> i64 {
    let Head { metric, codebook, dims, .. } = *chunk.head;
    // Ties go to the lowest; two keys may stand for the same groups.
    near.sort_unstable();
    near.dedup();
    let codes = near
        .iter()
        .flat_map(|&(group, bits)| (0..CODES).filter(move |&c| bits >> c & 1 == 1).map(move |c| group * CODES + c));
    let mut winner = [0];
    exact::nearest_of(metric, &chunk.x[row * dims..][..dims], codebook, codes, &mut winner);
    winner[0]
}
