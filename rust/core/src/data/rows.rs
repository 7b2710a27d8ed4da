//! One row at a time: scale, binarise, dequantise. The same bits on every instruction set: multiplications and
//! additions are never fused, and random draws are compared as integers.

use super::keys::RowKey;
use crate::simd::Level;

/// Compiles a function once per instruction set and picks the copy at run time.
macro_rules! per_level {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*) $body:block) => {
        $(#[$doc])*
        pub fn $name(level: Level, $($argument: $type),*) {
            #[inline(always)]
            fn portable($($argument: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($argument: $type),*) {
                portable($($argument),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($argument: $type),*) {
                portable($($argument),*);
            }
            match level {
                // SAFETY: callers get their level from `simd`, which detects it.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512F | Level::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2($($argument),*) },
                _ => portable($($argument),*),
            }
        }
    };
}

/// Elements that share a run of random words: word j of a block serves elements j (low half) and j + 16 (high half).
const BLOCK: usize = 32;
const HALF: usize = BLOCK / 2;

/// x / 255 * scale + shift in two parts: `high` has 16 significant bits, so that x * high is exact for a byte x.
#[derive(Debug, Clone, Copy)]
pub struct ByteScale {
    high: f32,
    low: f32,
    shift: f32,
}

impl ByteScale {
    pub fn new(scale: f64, shift: f64) -> Self {
        let factor = scale / 255.0;
        let high = f32::from_bits((factor as f32).to_bits() & !0xff);
        Self { high, low: (factor - f64::from(high)) as f32, shift: shift as f32 }
    }
}

per_level! {
    /// Bytes to floats.
    fn scale_bytes(source: &[u8], out: &mut [f32], by: ByteScale) {
        for (y, &x) in out.iter_mut().zip(source) {
            let x = f32::from(x);
            *y = x * by.high + (x * by.low + by.shift);
        }
    }
}

per_level! {
    /// `y * scale + shift`, in place.
    fn scale_floats(out: &mut [f32], scale: f32, shift: f32) {
        for y in out {
            *y = *y * scale + shift;
        }
    }
}

per_level! {
    /// `on` with probability x / 255, else `off`.
    fn binarize_bytes(source: &[u8], out: &mut [f32], key: RowKey, on: f32, off: f32) {
        blockwise(source, out, key, |x, random| {
            // The threshold of 16 random bits: 0 -> 0, 255 -> 65536, off by at most half a step between.
            let threshold = (x << 8) + x + (x >> 7);
            let mask = (random.wrapping_sub(threshold) as i32 >> 31) as u32;
            f32::from_bits((on.to_bits() & mask) | (off.to_bits() & !mask))
        });
    }
}

per_level! {
    /// `(x + u) / 256 * scale + shift` with u uniform on 2^16 steps of [0, 1): exact before the scale.
    fn dequantize_bytes(source: &[u8], out: &mut [f32], key: RowKey, scale: f32, shift: f32) {
        blockwise(source, out, key, |x, random| ((x << 16) | random) as i32 as f32 * INV_2_24 * scale + shift);
    }
}

per_level! {
    /// `on` with probability y, else `off`, in place; probabilities are cut to [0, 1] and have 24 bits.
    fn binarize_floats(out: &mut [f32], key: RowKey, on: f32, off: f32) {
        for (counter, y) in (0u32..).zip(out) {
            let uniform = (key.word(counter) >> 8) as i32 as f32 * INV_2_24;
            *y = if uniform < *y { on } else { off };
        }
    }
}

const INV_2_24: f32 = 1.0 / 16_777_216.0;

/// `combine(byte, 16 random bits)` for every element.
#[inline(always)]
fn blockwise(source: &[u8], out: &mut [f32], key: RowKey, combine: impl Fn(u32, u32) -> f32 + Copy) {
    let (blocks, rest) = source.as_chunks::<BLOCK>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<BLOCK>();
    let mut counter = 0;
    for (block, out) in blocks.iter().zip(out_blocks) {
        one_block(block, out, key, counter, combine);
        counter += HALF as u32;
    }
    if !rest.is_empty() {
        let (mut padded, mut result) = ([0; BLOCK], [0.0; BLOCK]);
        padded[..rest.len()].copy_from_slice(rest);
        one_block(&padded, &mut result, key, counter, combine);
        out_rest.copy_from_slice(&result[..rest.len()]);
    }
}

#[inline(always)]
fn one_block(
    source: &[u8; BLOCK],
    out: &mut [f32; BLOCK],
    key: RowKey,
    counter: u32,
    combine: impl Fn(u32, u32) -> f32,
) {
    let (low, high) = out.split_at_mut(HALF);
    for lane in 0..HALF {
        let word = key.word(counter + lane as u32);
        low[lane] = combine(u32::from(source[lane]), word & 0xffff);
        high[lane] = combine(u32::from(source[lane + HALF]), word >> 16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd;

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        for len in [0, 1, 15, 16, 31, 32, 33, 64, 100, 784] {
            let source: Vec<u8> = (0..len).map(|i| (i * 37 % 256) as u8).collect();
            let floats: Vec<f32> = source.iter().map(|&x| f32::from(x) / 255.0).collect();
            let key = RowKey::new(3, 4);
            let results: Vec<Vec<Vec<u32>>> = simd::available()
                .into_iter()
                .map(|level| {
                    let mut outputs = vec![vec![f32::NAN; len]; 3];
                    scale_bytes(level, &source, &mut outputs[0], ByteScale::new(1.9, -0.7));
                    binarize_bytes(level, &source, &mut outputs[1], key, 1.0, -1.0);
                    dequantize_bytes(level, &source, &mut outputs[2], key, 1.3, -0.1);
                    for in_place in 0..2 {
                        let mut out = floats.clone();
                        match in_place {
                            0 => scale_floats(level, &mut out, 1.9, -0.7),
                            _ => binarize_floats(level, &mut out, key, 1.0, 0.0),
                        }
                        outputs.push(out);
                    }
                    outputs.iter().map(|out| bits(out)).collect()
                })
                .collect();
            assert!(results.iter().all(|result| result == &results[0]), "{len}");
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_length() {
        let source: Vec<u8> = (0..100).map(|i| i * 2).collect();
        let (mut long, mut short) = (vec![0.0; 100], vec![0.0; 45]);
        binarize_bytes(Level::Portable, &source, &mut long, RowKey::new(1, 1), 1.0, 0.0);
        binarize_bytes(Level::Portable, &source[..45], &mut short, RowKey::new(1, 1), 1.0, 0.0);
        assert_eq!(long[..45], short);
    }

    #[test]
    fn bytes_scale_to_the_nearest_float() {
        let source: Vec<u8> = (0..=255).collect();
        for (scale, shift, ulps) in [(1.0, 0.0, 0.0), (2.0, -1.0, 0.51), (0.5, 0.25, 0.51)] {
            let mut out = vec![f32::NAN; 256];
            scale_bytes(simd::level(), &source, &mut out, ByteScale::new(scale, shift));
            for (&x, &y) in source.iter().zip(&out) {
                if shift == 0.0 {
                    assert_eq!(y.to_bits(), (f32::from(x) / 255.0).to_bits());
                }
                let exact = f64::from(x) / 255.0 * scale + shift;
                assert!(
                    (f64::from(y) - exact).abs()
                        <= ulps * f64::from(f32::EPSILON) + (exact as f32 as f64 - exact).abs()
                );
            }
            assert_eq!((out[0], out[255]), (shift as f32, (shift + scale) as f32));
        }
    }

    #[test]
    fn extremes_are_certain_and_dequantised_values_stay_in_their_cell() {
        let source = [[0u8; 4000], [255; 4000], [100; 4000]].concat();
        let mut out = vec![f32::NAN; source.len()];
        for index in 0..50 {
            let key = RowKey::new(9, index);
            binarize_bytes(simd::level(), &source, &mut out, key, 1.0, 0.0);
            assert_eq!(bits(&out[..8000]), bits(&[vec![0.0; 4000], vec![1.0; 4000]].concat()));
            dequantize_bytes(simd::level(), &source, &mut out, key, 1.0, 0.0);
            assert!(
                out.iter().zip(&source).all(|(&y, &x)| y >= f32::from(x) / 256.0 && y < (f32::from(x) + 1.0) / 256.0)
            );
        }
    }

    /// The exact law: x / 255 within half a step of 2^-16, and the frequency over many rows within five deviations.
    #[test]
    fn binarises_with_the_right_frequency() {
        let source: Vec<u8> = (0..=255).collect();
        let floats: Vec<f32> = source.iter().map(|&x| f32::from(x) / 255.0).collect();
        let trials = 4000u32;
        let mut counts = [[0u32; 256]; 2];
        let mut out = vec![0.0; 256];
        for trial in 0..trials {
            let key = RowKey::new(0, u64::from(trial));
            binarize_bytes(simd::level(), &source, &mut out, key, 1.0, 0.0);
            counts[0].iter_mut().zip(&out).for_each(|(count, &y)| *count += y as u32);
            out.copy_from_slice(&floats);
            binarize_floats(simd::level(), &mut out, key, 1.0, 0.0);
            counts[1].iter_mut().zip(&out).for_each(|(count, &y)| *count += y as u32);
        }
        for count in counts {
            let mut chi2 = 0.0;
            for (x, &ones) in count.iter().enumerate().take(255).skip(1) {
                let p = x as f64 / 255.0;
                assert!(((257 * x + (x >> 7)) as f64 / 65536.0 - p).abs() <= 0.5 / 65536.0 + 1e-12);
                let z = (f64::from(ones) - f64::from(trials) * p) / (f64::from(trials) * p * (1.0 - p)).sqrt();
                chi2 += z * z;
                assert!(z.abs() < 5.5, "{x}: {z}");
            }
            assert!((chi2 - 254.0).abs() < 5.0 * 508f64.sqrt(), "chi2 {chi2} of 254 degrees of freedom");
        }
    }
}
