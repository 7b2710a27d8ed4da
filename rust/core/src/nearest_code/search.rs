//! Searching a run of rows: the fast pass, its certificate, and float64 for what it leaves undecided.

use super::Metric;
use super::codebook::Prepared;
use super::exact::{self, Nearest};
use super::scan::{MOST_ROWS, SPAN, Smallest, Within, scan};
use super::vector::Vector;
use crate::simd::Level;

/// Floats of a block of codes that stays in the second-level cache while tiles of rows pass over it.
const BLOCK: usize = 64 * 1024;
/// Floats of the rows treated together, and the most tiles of them.
const CHUNK: usize = 64 * 1024;
const MOST_TILES: usize = 32;

/// One head: its codebook as it came [K, D] and prepared.
pub(crate) struct Head<'a> {
    pub metric: Metric,
    pub codebook: &'a [f32],
    pub dims: usize,
    /// Absent where float32 cannot be trusted, or too few rows would repay preparing.
    pub prepared: Option<Prepared>,
}

impl Head<'_> {
    fn size(&self) -> usize {
        self.codebook.len() / self.dims
    }
}

/// The `count` nearest codes of every row of `x` [n, D] into `out` [n, count].
pub(crate) fn search(level: Level, head: &Head, x: &[f32], count: usize, out: &mut [i64]) {
    let Some(prepared) = &head.prepared else { return search_exactly(head, x, count, out) };
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx2 => unsafe { search_avx2(head, prepared, x, count, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx512 => unsafe { search_avx512(head, prepared, x, count, out) },
        // SAFETY: portable vectors need no instruction set.
        _ => unsafe { search_with::<super::vector::Portable, 4>(head, prepared, x, count, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn search_avx2(head: &Head, prepared: &Prepared, x: &[f32], count: usize, out: &mut [i64]) {
    // SAFETY: this function enables the instruction set.
    unsafe { search_with::<super::vector::Avx2, 4>(head, prepared, x, count, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn search_avx512(head: &Head, prepared: &Prepared, x: &[f32], count: usize, out: &mut [i64]) {
    // SAFETY: this function enables the instruction set.
    unsafe { search_with::<super::vector::Avx512, 8>(head, prepared, x, count, out) }
}

/// Codes of a group of the level's kernel: how [`Prepared`] packs them, side by side.
pub(crate) fn lanes(level: Level) -> usize {
    if level == Level::Avx512 { 8 } else { 4 }
}

/// Every row against every code in float64.
fn search_exactly(head: &Head, x: &[f32], count: usize, out: &mut [i64]) {
    for (row, out) in x.chunks_exact(head.dims).zip(out.chunks_exact_mut(count)) {
        exact::nearest_of(head.metric, row, head.codebook, 0..head.size(), out);
    }
}

/// # Safety
/// As [`Vector`], and `prepared` was packed in groups of CODES.
#[inline(always)]
unsafe fn search_with<T: Vector, const CODES: usize>(
    head: &Head,
    prepared: &Prepared,
    x: &[f32],
    count: usize,
    out: &mut [i64],
) {
    let dims = head.dims;
    let width = SPAN * T::LANES;
    let groups = prepared.bias.len() / CODES;
    let step = (BLOCK / (dims * CODES)).max(1);
    let most = (CHUNK / (dims * width)).clamp(1, MOST_TILES).min((x.len() / dims).div_ceil(width)).max(1);
    let mut packed = vec![0.0; most * dims * width];
    let mut errors = vec![[0.0; MOST_ROWS]; most];
    // SAFETY: the caller's promise.
    let mut found = vec![unsafe { Smallest::<T>::new() }; most];
    let mut undecided: Vec<Undecided> = Vec::new();
    for (x, out) in x.chunks(most * width * dims).zip(out.chunks_mut(most * width * count)) {
        let tiles = (x.len() / dims).div_ceil(width);
        let rows = x.chunks(width * dims).zip(packed.chunks_exact_mut(dims * width));
        for ((x, tile), errors) in rows.zip(&mut errors) {
            // SAFETY: the caller's promise.
            *errors = unsafe { prepared.pack::<T>(x, tile) };
        }
        undecided.clear();
        if count == 1 {
            // SAFETY: the caller's promise; `packed` holds `tiles` tiles.
            unsafe {
                found.fill(Smallest::new());
                let mut first = 0;
                while first < groups {
                    let block = first..(first + step).min(groups);
                    for (tile, found) in found.iter_mut().enumerate().take(tiles) {
                        let rows = packed.as_ptr().add(tile * dims * width);
                        let mut state = *found;
                        let (codes, bias) = (prepared.codes.as_ptr(), prepared.bias.as_ptr());
                        scan::<T, CODES>(rows, dims, codes, bias, block.clone(), &mut state);
                        *found = state;
                    }
                    first += step;
                }
            }
            for (tile, out) in out.chunks_mut(width).enumerate() {
                // SAFETY: the caller's promise.
                let [best, second, group] = unsafe { found[tile].winners() };
                for (lane, out) in out.iter_mut().enumerate() {
                    let (row, error) = (tile * width + lane, errors[tile][lane]);
                    let margin = 2.0 * error;
                    if f64::from(second[lane]) - f64::from(best[lane]) > margin {
                        let column = &packed[tile * dims * width + lane..];
                        let x = &x[row * dims..][..dims];
                        *out = among::<CODES>(head, prepared, group[lane].to_bits() as usize, x, column, width, margin);
                    } else {
                        undecided.push(Undecided { row, error, limit: above(best[lane], margin) });
                    }
                }
            }
        } else {
            let errors = errors.iter().flat_map(|errors| &errors[..width]);
            let rows = (0..x.len() / dims).zip(errors);
            undecided.extend(rows.map(|(row, &error)| Undecided { row, error, limit: f32::INFINITY }));
        }
        for some in undecided.chunks(width) {
            // SAFETY: the caller's promise.
            unsafe { rescan::<T, CODES>(head, prepared, x, &packed, some, count, out) };
        }
    }
}

/// A row that the fast pass could not decide.
struct Undecided {
    row: usize,
    /// How far its scores may be from the truth.
    error: f64,
    /// No code with a float32 score above it is wanted.
    limit: f32,
}

/// `score + margin`, rounded up.
#[inline(always)]
fn above(score: f32, margin: f64) -> f32 {
    ((f64::from(score) + margin) as f32).next_up()
}

/// The winner among the codes of one group, for a row of which `column` holds the packed values at steps of `width`:
/// by float32 scores once more, and by float64 where those cannot tell.
#[inline(always)]
fn among<const CODES: usize>(
    head: &Head,
    prepared: &Prepared,
    group: usize,
    x: &[f32],
    column: &[f32],
    width: usize,
    margin: f64,
) -> i64 {
    let dims = head.dims;
    let codes = &prepared.codes[group * dims * CODES..][..dims * CODES];
    // Two sums a code: half as long a chain of dependent additions.
    let mut sums = [[0.0_f32; CODES]; 2];
    let (mut d, mut at) = (0, 0);
    while d < dims {
        let (value, part) = (column[at], d % 2);
        let code = &codes[d * CODES..][..CODES];
        let mut c = 0;
        while c < CODES {
            sums[part][c] += value * code[c];
            c += 1;
        }
        at += width;
        d += 1;
    }
    let bias = &prepared.bias[group * CODES..][..CODES];
    let mut scores = [0.0_f32; CODES];
    let mut least = f32::INFINITY;
    let mut c = 0;
    while c < CODES {
        scores[c] = bias[c] - (sums[0][c] + sums[1][c]);
        least = if scores[c] < least { scores[c] } else { least };
        c += 1;
    }
    let limit = above(least, margin);
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
    exact::nearest_of(head.metric, x, head.codebook, list.filter(|&k| k < head.size()), &mut winner);
    winner[0]
}

/// Decides up to a tile of rows, in float64 among the codes that their float32 scores and the error bound leave.
///
/// # Safety
/// As [`search_with`].
#[inline(always)]
unsafe fn rescan<T: Vector, const CODES: usize>(
    head: &Head,
    prepared: &Prepared,
    x: &[f32],
    packed: &[f32],
    some: &[Undecided],
    count: usize,
    out: &mut [i64],
) {
    let dims = head.dims;
    let width = SPAN * T::LANES;
    let mut tile = vec![0.0; dims * width];
    let mut limits = [f32::NEG_INFINITY; MOST_ROWS];
    let mut nearest: Vec<Nearest> = some.iter().map(|_| Nearest::new(count)).collect();
    for (lane, undecided) in some.iter().enumerate() {
        let row = undecided.row;
        let x = &x[row * dims..][..dims];
        if x.iter().any(|value| value.is_nan()) {
            (0..count).for_each(|k| nearest[lane].take(0.0, k, 0.0));
        } else if undecided.error.is_finite() {
            limits[lane] = undecided.limit;
            let column = packed[row / width * dims * width + row % width..].iter().step_by(width);
            tile.iter_mut().skip(lane).step_by(width).zip(column).for_each(|(slot, &value)| *slot = value);
        } else {
            // Without an error bound every code stays.
            exact::for_each(head.metric, x, head.codebook, 0..head.size(), |s, k| nearest[lane].take(s, k, 0.0));
        }
    }
    let take = |lane: usize, group: usize, scores: [f32; CODES], limit: f32| {
        let Undecided { row, error, .. } = some[lane];
        let list = (0..CODES).filter(|&c| scores[c] <= limit).map(|c| group * CODES + c);
        let list = list.filter(|&k| k < head.size());
        let nearest = &mut nearest[lane];
        exact::for_each(head.metric, &x[row * dims..][..dims], head.codebook, list, |score, k| {
            nearest.take(score, k, scores[k % CODES]);
        });
        // As many codes as are wanted are no further than this.
        nearest.farthest().map_or(limit, |farthest| limit.min(above(farthest, 2.0 * error)))
    };
    if limits.iter().any(|&limit| limit > f32::NEG_INFINITY) {
        let groups = 0..prepared.bias.len() / CODES;
        let (codes, bias) = (prepared.codes.as_ptr(), prepared.bias.as_ptr());
        // SAFETY: the caller's promise; `tile` is one tile.
        unsafe { scan::<T, CODES>(tile.as_ptr(), dims, codes, bias, groups, &mut Within { limits, take }) };
    }
    for (nearest, undecided) in nearest.iter().zip(some) {
        nearest.write(&mut out[undecided.row * count..][..count]);
    }
}
