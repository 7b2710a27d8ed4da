//! Packed rows, and what is kept of their scores.

use super::panel::Panel;
use crate::nearest_code::decide::above;
use crate::nearest_code::scan::SPAN;
use crate::nearest_code::vector::Floats;

/// How many rows are scored together, the largest first; a level uses those that fit its registers.
const TILES: [usize; 5] = [12, 8, 6, 4, 2];

/// Rows, centred and negated, in tiles.
pub(super) struct Rows {
    /// [D, rows of the tile] of every tile, zeros where a tile has rows too many.
    packed: Vec<f32>,
    /// Rows of every tile.
    tiles: Vec<usize>,
    /// |x - c| of every row; not finite where the row is not.
    pub norms: Vec<f64>,
}

impl Rows {
    /// `x` [n, D] for tiles of at most `most` rows.
    pub fn new<'a>(x: impl ExactSizeIterator<Item = &'a [f32]>, centre: &[f32], most: usize) -> Self {
        let dims = centre.len();
        let mut left = x.len();
        let mut tiles = Vec::new();
        while left > 0 {
            let larger = TILES.iter().copied().filter(|&size| size <= most && size >= left).min();
            tiles.push(larger.unwrap_or(most));
            left -= left.min(most);
        }
        let mut packed = vec![0.0; tiles.iter().sum::<usize>() * dims];
        let mut norms = Vec::with_capacity(x.len());
        for (row, x) in x.enumerate() {
            let (tile, lane) = (row / most, row % most);
            let column = &mut packed[tile * most * dims + lane..];
            // Eight sums: one would be a chain of dependent additions.
            let mut squares = [0.0_f64; 8];
            for (d, (slot, (&value, &centre))) in
                column.iter_mut().step_by(tiles[tile]).zip(x.iter().zip(centre)).enumerate()
            {
                *slot = centre - value;
                squares[d % 8] += f64::from(*slot) * f64::from(*slot);
            }
            norms.push(squares.iter().sum::<f64>().sqrt());
        }
        Self { packed, tiles, norms }
    }

    /// Hands the scores of every row against the codes of a panel to `sink`.
    ///
    /// # Safety
    /// As [`crate::nearest_code::vector::Vector`].
    #[inline(always)]
    pub unsafe fn score<T: Floats>(&self, panel: &Panel, number: usize, sink: &mut impl Sink<T>) {
        let dims = panel.values.len() / (SPAN * T::LANES);
        let mut row = 0;
        for &size in &self.tiles {
            // SAFETY: the caller's promise; tiles lie one after the other.
            unsafe {
                let x = self.packed.as_ptr().add(row * dims);
                let sink = |lane: usize, v: usize, scores: T| sink.take(row + lane, number * SPAN + v, scores);
                match size {
                    2 => panel.scores::<T, 2>(x, sink),
                    4 => panel.scores::<T, 4>(x, sink),
                    6 => panel.scores::<T, 6>(x, sink),
                    8 => panel.scores::<T, 8>(x, sink),
                    _ => panel.scores::<T, 12>(x, sink),
                }
            }
            row += size;
        }
    }

    /// Rows and what fills up the last tile.
    pub fn padded(&self) -> usize {
        self.tiles.iter().sum()
    }
}

/// What becomes of scores.
pub(super) trait Sink<T> {
    /// Those of a row against the vector of codes `number`.
    ///
    /// # Safety
    /// As [`crate::nearest_code::vector::Vector`].
    unsafe fn take(&mut self, row: usize, number: usize, scores: T);
}

/// Of every row and lane: the smallest score, the second-smallest, and the vector of the smallest.
pub(super) struct Smallest<T>(pub Vec<[T; 3]>);

impl<T: Floats> Sink<T> for Smallest<T> {
    #[inline(always)]
    unsafe fn take(&mut self, row: usize, number: usize, scores: T) {
        let [best, second, vector] = &mut self.0[row];
        // SAFETY: the caller's promise.
        unsafe {
            *second = second.min(scores.max(*best));
            *vector = T::select_less(scores, *best, T::splat(f32::from_bits(number as u32)), *vector);
            *best = scores.min(*best);
        }
    }
}

/// One lane of a row.
#[derive(Clone, Copy)]
pub(super) struct Lane {
    best: f32,
    second: f32,
    code: usize,
}

impl<T: Floats> Smallest<T> {
    /// The lanes of a row.
    ///
    /// # Safety
    /// As [`crate::nearest_code::vector::Vector`].
    #[inline(always)]
    pub unsafe fn lanes(&self, row: usize) -> impl Iterator<Item = Lane> {
        let mut out = [[0.0_f32; 16]; 3];
        for (values, out) in self.0[row].iter().zip(&mut out) {
            // SAFETY: the caller's promise; no vector has more than 16 lanes.
            unsafe { values.store(out.as_mut_ptr()) };
        }
        (0..T::LANES).map(move |lane| {
            let [best, second, vector] = out.map(|values| values[lane]);
            Lane { best, second, code: vector.to_bits() as usize * T::LANES + lane }
        })
    }
}

/// The codes of a row whose scores are within `margin` of the smallest, in increasing order; or, where a lane had
/// several of them and kept one, the limit that their scores are within.
pub(super) fn near(lanes: &[Lane], margin: f64) -> Result<Vec<usize>, f32> {
    let best = lanes.iter().fold(f32::INFINITY, |best, lane| if lane.best < best { lane.best } else { best });
    let limit = above(best, margin);
    if lanes.iter().any(|lane| lane.second <= limit) {
        return Err(limit);
    }
    let mut codes: Vec<usize> = lanes.iter().filter(|lane| lane.best <= limit).map(|lane| lane.code).collect();
    codes.sort_unstable();
    Ok(codes)
}

/// The codes of every row with scores within its limit, in increasing order.
pub(super) struct Within {
    pub limits: Vec<f32>,
    pub codes: Vec<Vec<usize>>,
}

impl<T: Floats> Sink<T> for Within {
    #[inline(always)]
    unsafe fn take(&mut self, row: usize, number: usize, scores: T) {
        // SAFETY: the caller's promise.
        let mut bits = unsafe { scores.at_most(T::splat(self.limits[row])) };
        while bits != 0 {
            self.codes[row].push(number * T::LANES + bits.trailing_zeros() as usize);
            bits &= bits - 1;
        }
    }
}
