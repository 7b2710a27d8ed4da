//! The fast pass in 16-bit integers: codes and rows rounded to a grid, and how far its scores can be from the truth.
//!
//! With x s and e t rounded to integers x' and e', s t (bias - x.e) differs from the integer score h - x'.e' by at most
//! |x s - x'| |e'| + |x s| |e t - e'| + |s t bias - h|, by Cauchy and Schwarz. Norms of x' and e' up to 2^15 - 1 keep
//! every element in 16 bits and every score in 32, whatever D is; sums on the way there may wrap around.

use std::ops::Range;

use super::codebook::Prepared;
use super::pairs::Pairs;
use super::scan::{MOST_ROWS, SPAN};
use super::vector::Vector;
use crate::simd::{self, Kernel, Lanes};

/// No norm of integers is larger.
const LARGEST_NORM: f64 = 32767.0;
/// No integer bias of a code is larger, and padding has this one: beyond every score.
const LARGEST_BIAS: f64 = (1_i64 << 29) as f64;
const NEVER: f32 = 2_147_483_520.0;
/// No limit is higher, so that padding stays above it.
const HIGHEST_LIMIT: i64 = NEVER as i64 - 1;
/// Spacing of floats at 1.
const SPACING: f64 = f32::EPSILON as f64;
/// Bits of a score that may carry the number of a group.
const MOST_BITS: u32 = 11;

/// Codes as integers: packed as those of [`Prepared`], in pairs of dimensions (a zero after an odd last one).
pub(super) struct IntegerCodes {
    /// [groups][ceil(D / 2)][GROUP].
    pub codes: Vec<i32>,
    /// Group numbers take `bits` bits after a shift by `shift`.
    pub bits: u32,
    pub shift: u32,
    pub scale: f32,
    /// Largest norm that x s or e t may have before it is rounded.
    room: f64,
    /// Largest norm of e', and of what rounding took from e t.
    largest: f64,
    lost: f64,
    largest_bias: f64,
}

impl IntegerCodes {
    /// Of packed codes, in groups of CODES; `None` where they are all equal.
    pub fn new<const CODES: usize>(prepared: &Prepared) -> Option<Self> {
        simd::run(simd::level(), Rounding::<CODES>(prepared))
    }

    #[inline(always)]
    fn of<const CODES: usize>(prepared: &Prepared) -> Option<Self> {
        let dims = prepared.centre.len();
        // Rounding moves a vector by half of its diagonal at most; 1 for the roundings of float32.
        let room = LARGEST_NORM - (dims as f64).sqrt() / 2.0 - 1.0;
        if !(prepared.largest > 0.0 && room > 0.0) {
            return None;
        }
        let scale = (room / prepared.largest) as f32;
        let groups = prepared.bias.len() / CODES;
        let steps = dims.div_ceil(2);
        let mut codes = vec![0; groups * steps * CODES];
        let mut most = 0.0_f32;
        let floats = prepared.codes.chunks_exact(dims * CODES);
        for (codes, floats) in codes.chunks_exact_mut(steps * CODES).zip(floats) {
            let mut squares = [0.0_f32; CODES];
            for (codes, floats) in codes.chunks_exact_mut(CODES).zip(floats.chunks(2 * CODES)) {
                let mut c = 0;
                while c < CODES {
                    let low = rounded(floats[c] * scale, &mut squares[c]);
                    codes[c] = low & 0xffff;
                    c += 1;
                }
                if floats.len() == CODES {
                    continue;
                }
                let mut c = 0;
                while c < CODES {
                    codes[c] |= rounded(floats[CODES + c] * scale, &mut squares[c]) << 16;
                    c += 1;
                }
            }
            most = squares.iter().fold(most, |most, &square| most.max(square));
        }
        let lost = norm(most, dims) + LARGEST_NORM * SPACING;
        let bits = usize::BITS - (groups - 1).leading_zeros();
        let shift = bits.saturating_sub(MOST_BITS);
        let largest_bias = if prepared.has_bias() { prepared.largest * prepared.largest / 2.0 } else { 0.0 };
        let largest = prepared.largest * f64::from(scale) + lost;
        Some(Self { codes, bits: bits - shift, shift, scale, room, largest, lost, largest_bias })
    }

    /// What rows of norm `largest` are multiplied by: as much as keeps scores in range.
    pub fn row_scale(&self, largest: f64) -> f32 {
        let bias = LARGEST_BIAS / (self.largest_bias * f64::from(self.scale));
        // The last keeps the product of both scales finite.
        (self.room / largest).min(bias).min(1e37 / f64::from(self.scale)) as f32
    }

    /// The biases [groups][GROUP] of scores of rows scaled by `row_scale`.
    #[inline(always)]
    pub fn bias(&self, bias: &[f32], row_scale: f32, out: &mut [i32]) {
        let unit = row_scale * self.scale;
        for (out, &bias) in out.iter_mut().zip(bias) {
            let scaled = bias * unit;
            // An infinite bias has no other place to go.
            let scaled = if scaled < NEVER { scaled } else { NEVER };
            // SAFETY: a number, not negative and below 2^31.
            *out = unsafe { scaled.round_ties_even().to_int_unchecked() };
        }
    }

    /// The groups that a key stands for, of so many.
    #[inline(always)]
    pub fn groups(&self, key: i32, groups: usize) -> Range<usize> {
        let number = key as usize & ((1 << self.bits) - 1);
        number << self.shift..((number + 1) << self.shift).min(groups)
    }

    /// No code with a score above it is nearest, for a row with that smallest key.
    #[inline(always)]
    pub fn limit(best: i32, margin: i64) -> i32 {
        i64::from(best).saturating_add(margin).min(HIGHEST_LIMIT) as i32
    }

    /// By how much the keys of two groups must differ to say which is nearer, for a row of that norm which lost `lost`
    /// in rounding and whose float32 scores may be wrong by `error`; never where the row does not fit.
    #[inline(always)]
    pub fn margin(&self, row_scale: f32, norm: f64, lost: f64, error: f64) -> i64 {
        let scale = f64::from(row_scale);
        let length = norm * scale;
        let lost = lost + length * SPACING + f64::from(f32::MIN_POSITIVE);
        let rounding = lost * self.largest + length * self.lost;
        let bias = 1.0 + LARGEST_BIAS * 2.0 * SPACING;
        let number = f64::from((1_u32 << self.bits) - 1);
        let error = rounding + bias + number + error * scale * f64::from(self.scale);
        // Also false for NaN. A conversion saturates.
        if length <= self.room * (1.0 + 4.0 * SPACING) { ((2.02 * error) as i64).saturating_add(1) } else { i64::MAX }
    }
}

/// [`IntegerCodes::new`], compiled for the level's instruction set.
struct Rounding<'a, const CODES: usize>(&'a Prepared);

impl<const CODES: usize> Kernel for Rounding<'_, CODES> {
    type Output = Option<IntegerCodes>;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Option<IntegerCodes> {
        IntegerCodes::of::<CODES>(self.0)
    }
}

/// Writes a tile of packed rows [D, SPAN * LANES] as pairs of integers [ceil(D / 2), SPAN * LANES]; returns the norms
/// of what rounding took.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(super) unsafe fn round<T: Pairs>(tile: &[f32], dims: usize, scale: f32, out: &mut [i32]) -> [f64; MOST_ROWS] {
    let width = SPAN * T::LANES;
    let mut squares = [0.0_f32; MOST_ROWS];
    // SAFETY: the caller's promise; rows and `squares` hold SPAN vectors.
    unsafe {
        let (zero, scale) = (T::Floats::splat(0.0), T::Floats::splat(scale));
        let mut sums = [zero; SPAN];
        for (rows, out) in tile[..dims * width].chunks(2 * width).zip(out.chunks_exact_mut(width)) {
            let mut v = 0;
            while v < SPAN {
                let low = T::Floats::load(rows.as_ptr().add(v * T::LANES));
                let odd = rows.len() == width;
                let high = if odd { zero } else { T::Floats::load(rows.as_ptr().add(width + v * T::LANES)) };
                let (pairs, sum) = T::round(low, high, scale, sums[v]);
                pairs.store(out.as_mut_ptr().add(v * T::LANES));
                sums[v] = sum;
                v += 1;
            }
        }
        for (v, sum) in sums.iter().enumerate() {
            sum.store(squares.as_mut_ptr().add(v * T::LANES));
        }
    }
    squares.map(|square| norm(square, dims))
}

/// The nearest integer; the square of what that took is added.
#[inline(always)]
fn rounded(value: f32, squares: &mut f32) -> i32 {
    let nearest = value.round_ties_even();
    *squares += (value - nearest) * (value - nearest);
    // SAFETY: codes are scaled to norms that fit 16 bits, and finite.
    unsafe { nearest.to_int_unchecked() }
}

/// The root of a sum of D squares, above the truth in spite of rounding.
#[inline(always)]
fn norm(square: f32, dims: usize) -> f64 {
    (f64::from(square) * (1.0 + (dims as f64 + 4.0) * SPACING)).sqrt()
}
