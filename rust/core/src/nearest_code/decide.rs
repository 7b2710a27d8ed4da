//! From the groups that the fast pass left of a row to its nearest codes: float32 scores, then float64.

use super::codebook::Prepared;
use super::exact::{self, Nearest};
use super::scan::{MOST_ROWS, SPAN, scan};
use super::search::{Chunk, Head};
use super::sinks::Within;
use super::vector::Floats;

/// A row alone costs this part of a whole tile, or less.
const ALONE: usize = 8;

/// A row that the fast pass could not decide.
pub(super) struct Undecided {
    pub row: usize,
    /// How far its float32 scores may be from the truth.
    pub error: f64,
    /// No code with a float32 score above it is wanted.
    pub limit: f32,
}

/// A row of a chunk, as it came and packed: its values at steps of `width`.
pub(super) struct Row<'a> {
    pub x: &'a [f32],
    pub column: &'a [f32],
    pub width: usize,
    /// By how much two scores must differ to say which is nearer.
    pub margin: f64,
}

/// `score + margin`, rounded up.
#[inline(always)]
pub(super) fn above(score: f32, margin: f64) -> f32 {
    ((f64::from(score) + margin) as f32).next_up()
}

/// Float32 scores of one group.
#[inline(always)]
fn scores<const CODES: usize>(prepared: &Prepared, group: usize, row: &Row) -> [f32; CODES] {
    let dims = row.x.len();
    let codes = &prepared.codes[group * dims * CODES..][..dims * CODES];
    // Two sums a code: half as long a chain of dependent additions.
    let mut sums = [[0.0_f32; CODES]; 2];
    let (mut d, mut at) = (0, 0);
    while d < dims {
        let (value, part) = (row.column[at], d % 2);
        let code = &codes[d * CODES..][..CODES];
        let mut c = 0;
        while c < CODES {
            sums[part][c] += value * code[c];
            c += 1;
        }
        at += row.width;
        d += 1;
    }
    let bias = &prepared.bias[group * CODES..][..CODES];
    let mut scores = [0.0_f32; CODES];
    let mut c = 0;
    while c < CODES {
        scores[c] = bias[c] + (sums[0][c] + sums[1][c]);
        c += 1;
    }
    scores
}

#[inline(always)]
fn least<const CODES: usize>(scores: &[f32; CODES]) -> f32 {
    let mut least = f32::INFINITY;
    let mut c = 0;
    while c < CODES {
        least = if scores[c] < least { scores[c] } else { least };
        c += 1;
    }
    least
}

/// The winner among the codes of one group: by float32 scores once more, and by float64 where those cannot tell.
#[inline(always)]
pub(super) fn among<const CODES: usize>(head: &Head, prepared: &Prepared, group: usize, row: &Row) -> i64 {
    let scores = scores::<CODES>(prepared, group, row);
    let limit = above(least(&scores), row.margin);
    let mut near = 0_u32;
    let mut c = 0;
    while c < CODES {
        near |= u32::from(scores[c] <= limit) << c;
        c += 1;
    }
    if near.is_power_of_two() {
        return (group * CODES) as i64 + i64::from(near.trailing_zeros());
    }
    let list = (0..CODES).filter(|&c| scores[c] <= limit).map(|c| group * CODES + c);
    let mut winner = [0];
    exact::nearest_of(head.metric, row.x, head.codebook, list.filter(|&k| k < head.size()), &mut winner);
    winner[0]
}

/// The smallest float32 score of a group.
#[inline(always)]
pub(super) fn least_of<const CODES: usize>(prepared: &Prepared, group: usize, row: &Row) -> f32 {
    least(&scores::<CODES>(prepared, group, row))
}

/// Takes those codes of a group that are not above the limit, in float64, and lowers the limit: as many codes as are
/// wanted are no further than that.
#[inline(always)]
fn take_group<const CODES: usize>(
    head: &Head,
    row: &Row,
    group: usize,
    scores: [f32; CODES],
    limit: &mut f32,
    nearest: &mut Nearest,
) {
    let list = (0..CODES).filter(|&c| scores[c] <= *limit).map(|c| group * CODES + c);
    let list = list.filter(|&k| k < head.size());
    exact::for_each(head.metric, row.x, head.codebook, list, |score, k| nearest.take(score, k, scores[k % CODES]));
    if let Some(farthest) = nearest.farthest() {
        *limit = limit.min(above(farthest, row.margin));
    }
}

/// Decides the rows of a chunk that the fast pass could not, in float64 among the codes that float32 scores leave.
///
/// # Safety
/// As [`super::search::search`] at a level with these vectors.
#[inline(always)]
pub(super) unsafe fn decide<T: Floats, const CODES: usize>(
    chunk: &Chunk,
    undecided: &[Undecided],
    count: usize,
    out: &mut [i64],
) {
    let Chunk { head, prepared, x, .. } = *chunk;
    let (dims, width) = (head.dims, SPAN * T::LANES);
    let groups = 0..prepared.bias.len() / CODES;
    for some in undecided.chunks(width) {
        let mut nearest: Vec<Nearest> = some.iter().map(|_| Nearest::new(count)).collect();
        let mut limits = [f32::NEG_INFINITY; MOST_ROWS];
        let mut rescanned = 0;
        for ((nearest, limit), undecided) in nearest.iter_mut().zip(&mut limits).zip(some) {
            let x = &x[undecided.row * dims..][..dims];
            if x.iter().any(|value| value.is_nan()) {
                (0..count).for_each(|k| nearest.take(0.0, k, 0.0));
            } else if undecided.error.is_finite() {
                *limit = undecided.limit;
                rescanned += 1;
            } else {
                // Without an error bound every code stays.
                exact::for_each(head.metric, x, head.codebook, 0..head.size(), |s, k| nearest.take(s, k, 0.0));
            }
        }
        let row = |lane: usize| {
            let Undecided { row, error, .. } = some[lane];
            chunk.row(row, width, 2.0 * error)
        };
        if rescanned * ALONE <= width {
            let waiting = limits.iter_mut().zip(&mut nearest).enumerate();
            for (lane, (limit, nearest)) in waiting.filter(|(_, (limit, _))| **limit > f32::NEG_INFINITY) {
                let row = row(lane);
                for group in groups.clone() {
                    let scores = scores::<CODES>(prepared, group, &row);
                    if least(&scores) <= *limit {
                        take_group(head, &row, group, scores, limit, nearest);
                    }
                }
            }
        } else {
            let mut tile = vec![0.0; dims * width];
            for lane in 0..some.len() {
                let column = row(lane).column.iter().step_by(width);
                tile.iter_mut().skip(lane).step_by(width).zip(column).for_each(|(slot, &value)| *slot = value);
            }
            let take = |lane: usize, group: usize, scores: [f32; CODES], mut limit: f32| {
                take_group(head, &row(lane), group, scores, &mut limit, &mut nearest[lane]);
                limit
            };
            let (codes, bias) = (prepared.codes.as_ptr(), prepared.bias.as_ptr());
            let mut within = Within { limits, take };
            // SAFETY: the caller's promise; `tile` is one tile.
            unsafe { scan::<T, CODES>(tile.as_ptr(), dims, codes, bias, groups.clone(), &mut within) };
        }
        for (nearest, undecided) in nearest.iter().zip(some) {
            nearest.write(&mut out[undecided.row * count..][..count]);
        }
    }
}
