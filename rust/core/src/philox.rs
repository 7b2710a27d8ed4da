//! Philox4x32-10 and standard normals from it: a pure function of a key and a counter.
//!
//! Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011). The normals use plain sums and products of
//! `f32` in a fixed order, no fused multiply-add, so every instruction set and the torch reference give the same bits.
//! Everything is `#[inline(always)]`: it is compiled for the instruction set of the kernel that calls it.

/// Counters worked on at once.
pub const LANES: usize = 16;
/// Normals that one batch of counters gives.
pub const BATCH: usize = 4 * LANES;

const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const LOW: u64 = 0xFFFF_FFFF;
/// Coefficients of ln, sine and cosine: Cephes (Moshier), as in the torch reference.
const LOG: [f32; 9] = [
    7.037_683_6e-2,
    -1.151_461e-1,
    1.167_699_8e-1,
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

/// 32-bit words in 64-bit lanes, so that products need no rearranging.
type Words = [u64; LANES];

/// The words of `LANES` counters under a key.
#[inline(always)]
pub fn philox(key: u64, mut counter: [Words; 4]) -> [Words; 4] {
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    let mut round = 0;
    while round < 10 {
        let mut lane = 0;
        while lane < LANES {
            let low = (counter[0][lane] & LOW) * MULTIPLIERS[0];
            let high = (counter[2][lane] & LOW) * MULTIPLIERS[1];
            counter[0][lane] = (high >> 32) ^ counter[1][lane] ^ u64::from(k0);
            counter[2][lane] = (low >> 32) ^ counter[3][lane] ^ u64::from(k1);
            counter[1][lane] = high & LOW;
            counter[3][lane] = low & LOW;
            lane += 1;
        }
        k0 = k0.wrapping_add(KEY_STEPS[0]);
        k1 = k1.wrapping_add(KEY_STEPS[1]);
        round += 1;
    }
    counter
}

/// Normals of some examples, for one sample and the columns `4 * first_group..4 * (first_group + groups)`: row after
/// row into `out`, whose length is `examples * 4 * groups` rounded up to a multiple of [`BATCH`]. `id(example)` names
/// the stream of an example.
#[inline(always)]
pub fn normals(
    key: u64,
    sample: u32,
    examples: usize,
    id: impl Fn(usize) -> u64,
    first_group: usize,
    groups: usize,
    out: &mut [f32],
) {
    let (mut example, mut group) = (0, 0);
    let mut stream = if examples > 0 { id(0) } else { 0 };
    let (batches, _) = out.as_chunks_mut::<BATCH>();
    for batch in batches {
        let mut counter = [[0; LANES], [u64::from(sample); LANES], [0; LANES], [0; LANES]];
        let mut lane = 0;
        while lane < LANES {
            counter[0][lane] = (first_group + group) as u64 & LOW;
            counter[2][lane] = stream & LOW;
            counter[3][lane] = stream >> 32;
            group += 1;
            if group == groups {
                group = 0;
                example += 1;
                stream = if example < examples { id(example) } else { 0 };
            }
            lane += 1;
        }
        let [w0, w1, w2, w3] = philox(key, counter);
        let mut lane = 0;
        while lane < LANES {
            let (n0, n1) = box_muller(w0[lane] as u32, w1[lane] as u32);
            let (n2, n3) = box_muller(w2[lane] as u32, w3[lane] as u32);
            batch[4 * lane] = n0;
            batch[4 * lane + 1] = n1;
            batch[4 * lane + 2] = n2;
            batch[4 * lane + 3] = n3;
            lane += 1;
        }
    }
}

/// Two normals from two words: radius times cosine, radius times sine.
#[inline(always)]
pub fn box_muller(radius_word: u32, angle_word: u32) -> (f32, f32) {
    let uniform = radius_word as f32 * 2.328_306_4e-10 + 1.164_153_2e-10; // 2^-32, 2^-33
    let radius = (ln(uniform) * -2.0).sqrt();
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

    fn words(key: u64, counter: [u32; 4]) -> [u64; 4] {
        philox(key, counter.map(|word| [u64::from(word); LANES])).map(|lanes| lanes[LANES - 1])
    }

    #[test]
    fn known_answers() {
        assert_eq!(words(0, [0; 4]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(words(u64::MAX, [u32::MAX; 4]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        assert_eq!(words(123_456_789_012_345, [7, 0, 0, 0]), [0xF427_116B, 0x1967_C062, 0x3989_68C8, 0x1873_9B1B]);
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
    fn a_batch_may_hold_any_part_of_the_rows() {
        let id = |example: usize| example as u64 * 3;
        let mut whole = [0.0; 6 * 4 * 5 + 8];
        normals(9, 2, 6, id, 0, 5, &mut whole);
        for example in 0..6 {
            let mut part = [0.0; BATCH];
            normals(9, 2, 1, |_| id(example), 3, 2, &mut part);
            assert_eq!(part[..8], whole[example * 20 + 12..example * 20 + 20]);
        }
    }
}
