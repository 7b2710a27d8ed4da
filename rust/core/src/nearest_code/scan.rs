//! The fast pass: scores of a tile of rows against groups of codes, in registers. Lanes are rows: a code's value is
//! broadcast, so that everything kept of a row stays in its lane and nothing is reduced across lanes.
//!
//! One body for float32, a dimension a step, and for 16-bit integers, two dimensions a step.

use std::ops::Range;

use super::vector::Vector;

/// Vectors of rows in a tile.
pub(super) const SPAN: usize = 2;
/// Steps of a tile that stay in the first-level cache; longer tiles are gone through in parts of so many, each for some
/// groups side by side.
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

/// Scores of one tile of negated rows, bias[k] - row.code[k], against `groups` of codes, each handed to the sink.
///
/// # Safety
/// As [`Vector`]; `x` is a tile [steps, SPAN * LANES], `codes` the groups [.., steps, CODES] and `bias` their biases.
#[inline(always)]
pub(super) unsafe fn scan<T: Vector, const CODES: usize>(
    x: *const T::Element,
    steps: usize,
    codes: *const T::Element,
    bias: *const T::Element,
    groups: Range<usize>,
    sink: &mut impl Sink<T, CODES>,
) {
    // SAFETY: the pointers stay inside what the caller promised: groups and steps are below their bounds.
    unsafe {
        let mut group = groups.start;
        if steps <= DEPTH {
            while group < groups.end {
                let scores = start::<T, CODES>(bias.add(group * CODES));
                sink.take(group, &go_on(scores, x, codes.add(group * steps * CODES), steps));
                group += 1;
            }
            return;
        }
        let mut partial = [[[T::splat(*bias); SPAN]; CODES]; SIDE_BY_SIDE];
        while group < groups.end {
            let size = (groups.end - group).min(SIDE_BY_SIDE);
            let mut first = 0;
            while first < steps {
                let depth = (steps - first).min(DEPTH);
                let mut g = 0;
                while g < size {
                    let number = group + g;
                    let scores = if first == 0 { start::<T, CODES>(bias.add(number * CODES)) } else { partial[g] };
                    let code = codes.add((number * steps + first) * CODES);
                    let scores = go_on(scores, x.add(first * SPAN * T::LANES), code, depth);
                    if first + depth == steps {
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

/// The scores of a group before any step: the biases.
///
/// # Safety
/// As [`scan`].
#[inline(always)]
unsafe fn start<T: Vector, const CODES: usize>(bias: *const T::Element) -> [[T; SPAN]; CODES] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut scores = [[T::splat(*bias); SPAN]; CODES];
        let mut c = 0;
        while c < CODES {
            scores[c] = [T::splat(*bias.add(c)); SPAN];
            c += 1;
        }
        scores
    }
}

/// The scores after `steps` more steps.
///
/// # Safety
/// As [`scan`].
#[inline(always)]
unsafe fn go_on<T: Vector, const CODES: usize>(
    mut scores: [[T; SPAN]; CODES],
    mut x: *const T::Element,
    mut code: *const T::Element,
    steps: usize,
) -> [[T; SPAN]; CODES] {
    let mut step = 0;
    while step < steps {
        // SAFETY: the caller's promise.
        unsafe {
            let (left, right) = (T::load(x), T::load(x.add(T::LANES)));
            let mut c = 0;
            while c < CODES {
                let value = T::splat(*code.add(c));
                scores[c][0] = scores[c][0].plus_product(left, value);
                scores[c][1] = scores[c][1].plus_product(right, value);
                c += 1;
            }
            x = x.add(SPAN * T::LANES);
            code = code.add(CODES);
        }
        step += 1;
    }
    scores
}
