//! The fast pass: float32 scores of a tile of rows against groups of codes, in registers. Lanes are rows: a code's
//! value is broadcast, so that everything kept of a row stays in its lane and nothing is reduced across lanes.

use std::ops::Range;

use super::vector::Vector;

/// Vectors of rows in a tile.
pub(super) const SPAN: usize = 2;
/// Dimensions of a tile that stay in the first-level cache; wider tiles are gone through in parts of so many, each for
/// some groups side by side.
const DEPTH: usize = 128;
const SIDE_BY_SIDE: usize = 4;
/// No tile has more rows.
pub(super) const MOST_ROWS: usize = SPAN * 16;

/// What becomes of the scores of a tile against one group of codes.
pub(super) trait Sink<T: Vector, const CODES: usize> {
    /// # Safety
    /// As [`Vector`].
    unsafe fn take(&mut self, group: usize, scores: &[[T; SPAN]; CODES]);
}

/// Scores of one tile of rows, bias[k] - x.code[k], against `groups` of codes, each handed to the sink.
///
/// # Safety
/// As [`Vector`]; `x` is a tile [D, SPAN * LANES], `codes` the groups [.., D, CODES] and `bias` their biases.
#[inline(always)]
pub(super) unsafe fn scan<T: Vector, const CODES: usize>(
    x: *const f32,
    dims: usize,
    codes: *const f32,
    bias: *const f32,
    groups: Range<usize>,
    sink: &mut impl Sink<T, CODES>,
) {
    // SAFETY: the pointers stay inside what the caller promised: groups and dimensions are below their bounds.
    unsafe {
        let mut group = groups.start;
        if dims <= DEPTH {
            while group < groups.end {
                let scores = start::<T, CODES>(bias.add(group * CODES));
                sink.take(group, &go_on(scores, x, codes.add(group * dims * CODES), dims));
                group += 1;
            }
            return;
        }
        let mut partial = [[[T::splat(0.0); SPAN]; CODES]; SIDE_BY_SIDE];
        while group < groups.end {
            let size = (groups.end - group).min(SIDE_BY_SIDE);
            let mut first = 0;
            while first < dims {
                let depth = (dims - first).min(DEPTH);
                let mut g = 0;
                while g < size {
                    let number = group + g;
                    let scores = if first == 0 { start::<T, CODES>(bias.add(number * CODES)) } else { partial[g] };
                    let code = codes.add((number * dims + first) * CODES);
                    let scores = go_on(scores, x.add(first * SPAN * T::LANES), code, depth);
                    if first + depth == dims {
                        sink.take(number, &scores);
                    } else {
                        partial[g] = scores;
                    }
                    g += 1;
                }
                first += depth;
            }
            group += size;
        }
    }
}

/// The scores of a group before any dimension: the biases.
///
/// # Safety
/// As [`scan`].
#[inline(always)]
unsafe fn start<T: Vector, const CODES: usize>(bias: *const f32) -> [[T; SPAN]; CODES] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut scores = [[T::splat(0.0); SPAN]; CODES];
        let mut c = 0;
        while c < CODES {
            scores[c] = [T::splat(*bias.add(c)); SPAN];
            c += 1;
        }
        scores
    }
}

/// The scores after `dims` more dimensions.
///
/// # Safety
/// As [`scan`].
#[inline(always)]
unsafe fn go_on<T: Vector, const CODES: usize>(
    mut scores: [[T; SPAN]; CODES],
    mut x: *const f32,
    mut code: *const f32,
    dims: usize,
) -> [[T; SPAN]; CODES] {
    let mut d = 0;
    while d < dims {
        // SAFETY: the caller's promise.
        unsafe {
            let (left, right) = (T::load(x), T::load(x.add(T::LANES)));
            let mut c = 0;
            while c < CODES {
                let value = T::splat(*code.add(c));
                scores[c][0] = scores[c][0].minus_product(left, value);
                scores[c][1] = scores[c][1].minus_product(right, value);
                c += 1;
            }
            x = x.add(SPAN * T::LANES);
            code = code.add(CODES);
        }
        d += 1;
    }
    scores
}

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
/// Which of its codes won is left to [`super::search`].
#[derive(Clone, Copy)]
pub(super) struct Smallest<T> {
    best: [T; SPAN],
    second: [T; SPAN],
    group: [T; SPAN],
}

impl<T: Vector> Smallest<T> {
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

impl<T: Vector, const CODES: usize> Sink<T, CODES> for Smallest<T> {
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

/// Hands on the groups with a score that is not above its row's limit: `take(lane, group, scores, limit)` returns
/// the row's new limit.
pub(super) struct Within<F> {
    pub limits: [f32; MOST_ROWS],
    pub take: F,
}

impl<T: Vector, const CODES: usize, F: FnMut(usize, usize, [f32; CODES], f32) -> f32> Sink<T, CODES> for Within<F> {
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
