//! What is kept of the scores of a tile: the smallest, or those within a limit.

use super::pairs::Pairs;
use super::scan::{MOST_ROWS, SPAN, Sink};
use super::vector::{Floats, Vector};

/// The smallest score of a group, in every lane.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn smallest<T: Vector, const CODES: usize>(scores: &[[T; SPAN]; CODES], v: usize) -> T {
    let mut least = scores[0][v];
    let mut c = 1;
    // SAFETY: the caller's promise. In pairs, which shortens the chain of dependent minima.
    unsafe {
        while c + 1 < CODES {
            least = least.min(scores[c][v].min(scores[c + 1][v]));
            c += 2;
        }
        if c < CODES {
            least = least.min(scores[c][v]);
        }
    }
    least
}

/// Tracks, lane by lane, the smallest and second-smallest of the groups' minima, and the group of the smallest.
/// Which of its codes won is left to [`super::decide`].
#[derive(Clone, Copy)]
pub(super) struct Smallest<T> {
    best: [T; SPAN],
    second: [T; SPAN],
    group: [T; SPAN],
}

impl<T: Floats> Smallest<T> {
    /// # Safety
    /// As [`Vector`].
    #[inline(always)]
    pub unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        let infinite = unsafe { T::splat(f32::INFINITY) };
        Self { best: [infinite; SPAN], second: [infinite; SPAN], group: [infinite; SPAN] }
    }

    /// Of every row of the tile the smallest and second-smallest group minimum, and the smallest's group.
    ///
    /// # Safety
    /// As [`Vector`].
    #[inline(always)]
    pub unsafe fn winners(&self) -> [[f32; MOST_ROWS]; 3] {
        let mut out = [[0.0; MOST_ROWS]; 3];
        for (values, out) in [self.best, self.second, self.group].iter().zip(&mut out) {
            for (v, value) in values.iter().enumerate() {
                // SAFETY: the caller's promise; SPAN vectors of at most 16 lanes fit.
                unsafe { value.store(out.as_mut_ptr().add(v * T::LANES)) };
            }
        }
        out
    }
}

impl<T: Floats, const CODES: usize> Sink<T, CODES> for Smallest<T> {
    #[inline(always)]
    unsafe fn take(&mut self, group: usize, scores: &[[T; SPAN]; CODES]) {
        let mut v = 0;
        while v < SPAN {
            // SAFETY: the caller's promise. The group's number travels as bits: vectors only move it.
            unsafe {
                let least = smallest(scores, v);
                let number = T::splat(f32::from_bits(group as u32));
                self.group[v] = T::select_less(least, self.best[v], number, self.group[v]);
                self.second[v] = self.second[v].min(self.best[v].max(least));
                self.best[v] = self.best[v].min(least);
            }
            v += 1;
        }
    }
}

/// So many groups of a row are known by number, and the minimum of one more.
pub(super) const KNOWN: usize = 3;

/// Tracks, lane by lane, the smallest of the groups' minima. A score's low bits, which its error makes worthless,
/// carry the number of its group: a minimum moves both.
#[derive(Clone, Copy)]
pub(super) struct Keys<T> {
    smallest: [[T; SPAN]; KNOWN + 1],
    low: T,
    shift: u32,
}

impl<T: Pairs> Keys<T> {
    /// For group numbers of `bits` bits after a shift to the right.
    ///
    /// # Safety
    /// As [`Vector`].
    #[inline(always)]
    pub unsafe fn new(bits: u32, shift: u32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self { smallest: [[T::splat(i32::MAX); SPAN]; KNOWN + 1], low: T::splat((1 << bits) - 1), shift } }
    }

    /// Of every row of the tile the keys, smallest first; `i32::MAX` where there were fewer groups.
    ///
    /// # Safety
    /// As [`Vector`].
    #[inline(always)]
    pub unsafe fn store(&self) -> [[i32; MOST_ROWS]; KNOWN + 1] {
        let mut out = [[0; MOST_ROWS]; KNOWN + 1];
        for (values, out) in self.smallest.iter().zip(&mut out) {
            for (v, value) in values.iter().enumerate() {
                // SAFETY: the caller's promise; SPAN vectors of at most 16 lanes fit.
                unsafe { value.store(out.as_mut_ptr().add(v * T::LANES)) };
            }
        }
        out
    }
}

impl<T: Pairs, const CODES: usize> Sink<T, CODES> for Keys<T> {
    #[inline(always)]
    unsafe fn take(&mut self, group: usize, scores: &[[T; SPAN]; CODES]) {
        let mut v = 0;
        // SAFETY: the caller's promise.
        unsafe {
            let number = T::splat((group >> self.shift) as i32);
            while v < SPAN {
                let mut key = smallest(scores, v).with_low_bits(self.low, number);
                let mut rank = 0;
                while rank <= KNOWN {
                    let before = self.smallest[rank][v];
                    self.smallest[rank][v] = before.min(key);
                    key = before.max(key);
                    rank += 1;
                }
                v += 1;
            }
        }
    }
}

/// Hands on the groups with a score that is not above its row's limit: `take(lane, group, scores, limit)` returns
/// the row's new limit.
pub(super) struct Within<F> {
    pub limits: [f32; MOST_ROWS],
    pub take: F,
}

impl<T: Floats, const CODES: usize, F: FnMut(usize, usize, [f32; CODES], f32) -> f32> Sink<T, CODES> for Within<F> {
    #[inline(always)]
    unsafe fn take(&mut self, group: usize, scores: &[[T; SPAN]; CODES]) {
        for v in 0..SPAN {
            // SAFETY: the caller's promise; limits and buffer hold the tile's lanes.
            unsafe {
                let mut lanes = smallest(scores, v).at_most(T::load(self.limits.as_ptr().add(v * T::LANES)));
                if lanes == 0 {
                    continue;
                }
                let mut stored = [[0.0; 16]; CODES];
                for (stored, scores) in stored.iter_mut().zip(scores) {
                    scores[v].store(stored.as_mut_ptr());
                }
                while lanes != 0 {
                    let lane = lanes.trailing_zeros() as usize;
                    lanes &= lanes - 1;
                    let row = v * T::LANES + lane;
                    let scores = stored.map(|scores| scores[lane]);
                    self.limits[row] = (self.take)(row, group, scores, self.limits[row]);
                }
            }
        }
    }
}
