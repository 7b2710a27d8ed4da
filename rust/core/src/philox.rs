//! Philox4x32-10 and standard normals from it: a pure function of a key and a counter.
//!
//! Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011). The normals use plain sums and products of
//! `f32` in a fixed order, no fused multiply-add, so every instruction set and the torch reference give the same bits.
//! Everything is `#[inline(always)]`: it is compiled for the instruction set of the kernel that calls it.

use crate::simd::Aligned;

/// Counters worked on at once; four normals each.
pub const GROUPS: usize = 128;
/// Loops run over a multiple of this, so that none ends in single steps.
pub const STEP: usize = 32;

const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const LOW: u64 = 0xFFFF_FFFF;
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Coefficients of ln, sine and cosine: Cephes (Moshier), as in the torch reference.
const LOG: [f32; 9] = [
    7.037_683_6e-2,
    -1.151_461e-1,
    1.167_699_84e-1,
    -1.242_014_1e-1,
    1.424_932_3e-1,
    -1.666_805_8e-1,
    2.000_071_4e-1,
    -2.499_999_4e-1,
    3.333_333e-1,
];
const SINE: [f32; 3] = [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1];
const COSINE: [f32; 3] = [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2];
const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
const SQRT_HALF_BITS: i32 = 0x3F35_04F3;

/// The words of a counter under a key. Straight code: loops over counters are vectorised around it.
#[inline(always)]
pub fn philox(key: u64, counter: [u32; 4]) -> [u32; 4] {
    ten_rounds(key, counter.map(u64::from)).map(|word| word as u32)
}

/// The words, in the low halves.
#[inline(always)]
fn ten_rounds(key: u64, counter: [u64; 4]) -> [u64; 4] {
    let key = [key as u32, (key >> 32) as u32];
    let words = five_rounds(key, counter);
    let key = [key[0].wrapping_add(KEY_STEPS[0].wrapping_mul(5)), key[1].wrapping_add(KEY_STEPS[1].wrapping_mul(5))];
    five_rounds(key, words)
}

#[inline(always)]
fn five_rounds(key: [u32; 2], words: [u64; 4]) -> [u64; 4] {
    let words = round(key, 0, words);
    let words = round(key, 1, words);
    let words = round(key, 2, words);
    let words = round(key, 3, words);
    round(key, 4, words)
}

/// Only the low halves of the words count. What is in the high ones stays there: a vector of `u64` is multiplied by its
/// low halves as it is, while one of `u32` would be taken apart and put together again in every round.
#[inline(always)]
fn round(key: [u32; 2], number: u32, [c0, c1, c2, c3]: [u64; 4]) -> [u64; 4] {
    let low = (c0 & LOW) * MULTIPLIERS[0];
    let high = (c2 & LOW) * MULTIPLIERS[1];
    let k0 = key[0].wrapping_add(KEY_STEPS[0].wrapping_mul(number));
    let k1 = key[1].wrapping_add(KEY_STEPS[1].wrapping_mul(number));
    [(high >> 32) ^ c1 ^ u64::from(k0), high, (low >> 32) ^ c3 ^ u64::from(k1), low]
}

/// The counters of some examples and columns, and room to work; made once, placed for each block of them.
pub struct Noise {
    group: Aligned<[u64; GROUPS]>,
    low: Aligned<[u64; GROUPS]>,
    high: Aligned<[u64; GROUPS]>,
    /// Two words a counter.
    radius: Aligned<[u64; GROUPS]>,
    angle: Aligned<[u64; GROUPS]>,
    radii: Aligned<[f32; 2 * GROUPS]>,
    /// How many counters, rounded up to whole steps.
    count: usize,
}

impl Noise {
    /// No counters.
    #[inline(always)]
    pub fn new() -> Self {
        let words = Aligned([0; GROUPS]);
        let radii = Aligned([0.0; 2 * GROUPS]);
        Self { group: words, low: words, high: words, radius: words, angle: words, radii, count: 0 }
    }

    /// Columns `4 * first_group..4 * (first_group + groups)` of `examples` examples, row after row, at most [`GROUPS`]
    /// in all; `id(example)` names the stream of an example.
    #[inline(always)]
    pub fn place(&mut self, examples: usize, id: impl Fn(usize) -> u64, first_group: usize, groups: usize) {
        self.count = (examples * groups).next_multiple_of(STEP / 4).min(GROUPS);
        let mut example = 0;
        while example < examples {
            let (start, id) = (example * groups, id(example));
            let mut at = 0;
            while at < groups {
                self.group.0[start + at] = (first_group + at) as u64;
                self.low.0[start + at] = id;
                self.high.0[start + at] = id >> 32;
                at += 1;
            }
            example += 1;
        }
    }

    /// The normals of one sample, four a counter, into the beginning of `out`.
    #[inline(always)]
    pub fn normals(&mut self, key: u64, sample: u32, out: &mut [f32; 4 * GROUPS]) {
        let count = self.count.min(GROUPS);
        let counters = [&self.group.0[..count], &self.low.0[..count], &self.high.0[..count]];
        words(key, sample, counters, &mut self.radius.0[..count], &mut self.angle.0[..count]);
        radii(halves(&self.radius.0[..count]), &mut self.radii.0[..2 * count]);
        box_mullers(&self.radii.0[..2 * count], halves(&self.angle.0[..count]), &mut out[..4 * count]);
    }
}

/// The words of counters: the even ones into `radius`, the odd ones into `angle`.
#[inline(always)]
fn words(key: u64, sample: u32, [group, low, high]: [&[u64]; 3], radius: &mut [u64], angle: &mut [u64]) {
    let (low, high) = (&low[..group.len()], &high[..group.len()]);
    let (radius, angle) = (&mut radius[..group.len()], &mut angle[..group.len()]);
    let mut at = 0;
    while at < group.len() {
        let [w0, w1, w2, w3] = ten_rounds(key, [group[at], u64::from(sample), low[at], high[at]]);
        radius[at] = (w0 & LOW | w2 << 32).to_le();
        angle[at] = (w1 & LOW | w3 << 32).to_le();
        at += 1;
    }
}

/// The pairs of words in numbers that [`words`] wrote.
#[inline(always)]
fn halves(pairs: &[u64]) -> &[u32] {
    // SAFETY: as many bytes, aligned more than enough; any bits are a `u32`.
    unsafe { std::slice::from_raw_parts(pairs.as_ptr().cast(), 2 * pairs.len()) }
}

/// The radii of words. A loop of its own: the chains of dependent instructions of several vectors must fit what the
/// processor looks at, or it waits.
#[inline(always)]
fn radii(words: &[u32], out: &mut [f32]) {
    let out = &mut out[..words.len()];
    let mut at = 0;
    while at < words.len() {
        out[at] = radius(words[at]);
        at += 1;
    }
}

/// The pairs of normals of radii and words.
#[inline(always)]
fn box_mullers(radii: &[f32], angle: &[u32], out: &mut [f32]) {
    let (out, _) = out.as_chunks_mut::<2>();
    let (angle, out) = (&angle[..radii.len()], &mut out[..radii.len()]);
    let mut at = 0;
    while at < radii.len() {
        let (first, second) = on_circle(radii[at], angle[at]);
        out[at] = [first, second];
        at += 1;
    }
}

impl Default for Noise {
    fn default() -> Self {
        Self::new()
    }
}

/// Two normals from two words: radius times cosine, radius times sine.
#[inline(always)]
pub fn box_muller(radius_word: u32, angle_word: u32) -> (f32, f32) {
    on_circle(radius(radius_word), angle_word)
}

/// sqrt(-2 ln u) with u = (word + 1/2) / 2^32.
#[inline(always)]
fn radius(word: u32) -> f32 {
    let uniform = word as f32 * 2.328_306_4e-10 + 1.164_153_2e-10; // 2^-32, 2^-33
    (ln(uniform) * -2.0).sqrt()
}

/// The radius times cosine and sine of the angle.
#[inline(always)]
fn on_circle(radius: f32, angle_word: u32) -> (f32, f32) {
    let turns = (angle_word >> 8) as i32;
    let quarter = (turns + (1 << 21)) >> 22; // 0..=4: the nearest multiple of a quarter turn
    let angle = (turns - (quarter << 22)) as f32 * 3.745_070_3e-7; // 2 pi 2^-24
    let square = angle * angle;
    let sine = ((SINE[0] * square + SINE[1]) * square + SINE[2]) * square * angle + angle;
    let cosine = ((COSINE[0] * square + COSINE[1]) * square + COSINE[2]) * square * square - square * 0.5 + 1.0;
    let swap = quarter & 1 != 0;
    let (first, second) = if swap { (sine, cosine) } else { (cosine, sine) };
    let first_sign = ((quarter + 1) as u32 & 2) << 30;
    let second_sign = (quarter as u32 & 2) << 30;
    (radius * f32::from_bits(first.to_bits() ^ first_sign), radius * f32::from_bits(second.to_bits() ^ second_sign))
}

/// A standard Gumbel number, -ln(-ln u) with u = (word + 1/2) / 2^32: from -3.13 to 22.88.
///
/// Where u is above 1/2, ln u is taken of 1 - u, so that both tails keep all digits; one logarithm serves both cases.
#[inline(always)]
pub fn gumbel(word: u32) -> f32 {
    let upper = word >> 31 != 0;
    let near = if upper { !word } else { word };
    let small = near as i32 as f32 * 2.328_306_4e-10 + 1.164_153_2e-10; // 2^-32, 2^-33
    let rest = 1.0 - small;
    let lost = (1.0 - rest) - small; // 1 - small = rest + lost
    let (argument, correction) = if upper { (rest, lost / rest) } else { (small, 0.0) };
    -ln(-(ln(argument) + correction))
}

/// ln x for normal x > 0: x = 2^exponent (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), a polynomial in f.
#[inline(always)]
fn ln(x: f32) -> f32 {
    let bits = x.to_bits() as i32;
    let exponent = (bits - SQRT_HALF_BITS) >> 23;
    let f = f32::from_bits((bits - (exponent << 23)) as u32) - 1.0;
    let square = f * f;
    let mut series = LOG[0];
    let mut term = 1;
    while term < LOG.len() {
        series = series * f + LOG[term];
        term += 1;
    }
    let power = exponent as f32;
    series * f * square + power * LN2[1] - square * 0.5 + f + power * LN2[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        assert_eq!(philox(0, [0; 4]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(philox(u64::MAX, [u32::MAX; 4]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        assert_eq!(philox(123_456_789_012_345, [7, 0, 0, 0]), [0xF427_116B, 0x1967_C062, 0x3989_68C8, 0x1873_9B1B]);
    }

    #[test]
    fn normals_are_those_of_exact_arithmetic() {
        for step in 0..200_000_u32 {
            let (radius_word, angle_word) = (step.wrapping_mul(2_654_435_769), step.wrapping_mul(40_503_001) ^ 0xA5A5);
            let uniform = radius_word as f32 * 2.328_306_4e-10 + 1.164_153_2e-10;
            let radius = (-2.0 * f64::from(uniform).ln()).sqrt();
            let angle = f64::from(angle_word >> 8) * std::f64::consts::TAU / f64::from(1 << 24);
            let (first, second) = box_muller(radius_word, angle_word);
            assert!((f64::from(first) - radius * angle.cos()).abs() < 1e-6, "{radius_word} {angle_word}");
            assert!((f64::from(second) - radius * angle.sin()).abs() < 1e-6, "{radius_word} {angle_word}");
        }
    }

    #[test]
    fn gumbels_are_those_of_exact_arithmetic_in_both_tails() {
        let ends = (0..2000).flat_map(|word| [word, !word, (1 << 31) + word, (1 << 31) - 1 - word]);
        for word in ends.chain((0..200_000_u32).map(|step| step.wrapping_mul(2_654_435_769))) {
            let upper = (f64::from(u32::MAX - word) + 0.5) / 4_294_967_296.0;
            let logarithm =
                if word >> 31 == 0 { ((f64::from(word) + 0.5) / 4_294_967_296.0).ln() } else { (-upper).ln_1p() };
            let truth = -(-logarithm).ln();
            assert!((f64::from(gumbel(word)) - truth).abs() < 4e-7 * truth.abs().max(1.0), "{word}");
        }
    }

    #[test]
    fn blocks_may_be_any_part_of_the_rows() {
        let id = |example: usize| (example as u64 * 3) << 31;
        let mut whole = [0.0; 4 * GROUPS];
        let mut noise = Noise::new();
        noise.place(6, id, 0, 5);
        noise.normals(9, 2, &mut whole);
        for example in 0..6 {
            let mut part = [0.0; 4 * GROUPS];
            noise.place(1, |_| id(example), 3, 2);
            noise.normals(9, 2, &mut part);
            assert_eq!(part[..8], whole[example * 20 + 12..example * 20 + 20]);
        }
    }
}
