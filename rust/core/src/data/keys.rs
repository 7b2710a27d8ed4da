//! Keys of the random streams: words are mixed in one after the other, never added together, so that no two
//! (seed, epoch, index) share a stream by arithmetic, as `seed + epoch` does.

/// The stream that orders an epoch.
pub const ORDER: u64 = 1;
/// The stream of the random transforms.
pub const DRAW: u64 = 2;

const SALT: u64 = 0xd1b5_4a32_d192_ed03;
const ODD: u64 = 0xd6e8_feb8_6659_fd93;

/// A bijection of 64 bits that avalanches (splitmix64's step: the constant comes first, so 0 is no fixed point).
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `key` with another word mixed in; distinct words give distinct keys.
pub fn absorb(key: u64, word: u64) -> u64 {
    mix(mix(key) ^ word.wrapping_mul(ODD))
}

/// The key of a stream of one epoch.
pub fn epoch_key(stream: u64, seed: u64, epoch: u64) -> u64 {
    [stream, seed, epoch].into_iter().fold(SALT, absorb)
}

/// Uniform 64-bit words from a key, one after the other.
#[derive(Debug, Clone)]
pub struct Stream {
    key: u64,
    counter: u64,
}

impl Stream {
    /// The stream of `key`.
    pub fn new(key: u64) -> Self {
        Self { key: mix(key), counter: 0 }
    }

    /// The next word.
    pub fn word(&mut self) -> u64 {
        self.counter += 1;
        mix(self.counter.wrapping_mul(ODD) ^ self.key).wrapping_add(self.key.rotate_left(32))
    }

    /// A uniform integer in `0..bound` (Lemire 2019: multiply, and reject the few words that would be biased).
    pub fn below(&mut self, bound: u32) -> u32 {
        let bound = u64::from(bound);
        loop {
            let product = (self.word() >> 32) * bound;
            let low = product & 0xffff_ffff;
            if low >= bound || low >= (1 << 32) % bound {
                return (product >> 32) as u32;
            }
        }
    }
}

/// The random words of one example in one epoch: word i is a bijection of i under a 128-bit key, so a row's words
/// come in any order and any vector width.
#[derive(Debug, Clone, Copy)]
pub struct RowKey([u32; 4]);

impl RowKey {
    /// The words of example `index` under an epoch's key.
    pub fn new(epoch_key: u64, index: u64) -> Self {
        let first = absorb(epoch_key, index);
        let second = mix(first ^ SALT);
        Self([first as u32, (first >> 32) as u32, second as u32, (second >> 32) as u32])
    }

    /// Word `counter`: Wellons' triple32 with a key word between its rounds; multiplications of 32 bits only,
    /// which every vector unit has.
    #[inline(always)]
    pub fn word(self, counter: u32) -> u32 {
        let [k0, k1, k2, k3] = self.0;
        let mut x = counter.wrapping_add(k0);
        x = (x ^ (x >> 17)).wrapping_mul(0xed5a_d4bb).wrapping_add(k1);
        x = (x ^ (x >> 11)).wrapping_mul(0xac4c_1b51).wrapping_add(k2);
        x = (x ^ (x >> 15)).wrapping_mul(0x3184_8bab) ^ k3;
        x ^ (x >> 14)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn seed_and_epoch_are_not_interchangeable() {
        let keys: HashSet<u64> =
            (0..300).flat_map(|seed| (0..300).map(move |epoch| epoch_key(ORDER, seed, epoch))).collect();
        assert_eq!(keys.len(), 300 * 300);
        assert_ne!(epoch_key(ORDER, 0, 0), 0);
        assert_ne!(epoch_key(ORDER, 1, 2), epoch_key(ORDER, 2, 1));
        assert_ne!(epoch_key(ORDER, 1, 2), epoch_key(DRAW, 1, 2));
    }

    #[test]
    fn flipping_any_input_bit_flips_half_of_the_key() {
        let mut flips = 0;
        for bit in 0..64 {
            for seed in 0..50u64 {
                flips += (epoch_key(DRAW, seed, 7) ^ epoch_key(DRAW, seed ^ (1 << bit), 7)).count_ones();
                flips += (epoch_key(DRAW, 7, seed) ^ epoch_key(DRAW, 7, seed ^ (1 << bit))).count_ones();
            }
        }
        // 6400 comparisons of 64 fair bits: standard deviation 320 of 204800; five of them.
        assert!((f64::from(flips) - 204_800.0).abs() < 1600.0, "{flips}");
    }

    #[test]
    fn below_is_uniform() {
        let mut stream = Stream::new(0);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[stream.below(7) as usize] += 1;
        }
        let chi2: f64 = counts.iter().map(|&c| (f64::from(c) - 10_000.0).powi(2) / 10_000.0).sum();
        assert!(chi2 < 30.0, "chi2 {chi2} of 6 degrees of freedom"); // p = 4e-5
    }

    /// Mean and lag correlations of the 16-bit halves, over neighbouring words, examples, epochs and seeds.
    #[test]
    fn words_are_uniform_and_uncorrelated() {
        let centred = |word: u32| {
            [word & 0xffff, word >> 16].map(|half| (f64::from(half) + 0.5) / 65536.0 - 0.5) // variance 1/12
        };
        let rows = 500u64;
        let words = 400u32;
        let count = rows as f64 * f64::from(words);
        let neighbours: [(u64, u64, u64, u32); 5] =
            [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)];
        for (seed, epoch, index, step) in neighbours {
            let same = (seed, epoch, index, step) == (0, 0, 0, 0);
            // Sums of x, and of x y for the four pairs of halves.
            let (mut mean, mut products) = (0.0, [0.0; 4]);
            for row in 0..rows {
                let a = RowKey::new(epoch_key(DRAW, 0, 0), row);
                let b = RowKey::new(epoch_key(DRAW, seed, epoch), row + index);
                for word in 0..words {
                    let ([x0, x1], [y0, y1]) = (centred(a.word(word)), centred(b.word(word + step)));
                    mean += x0 + x1;
                    for (sum, product) in products.iter_mut().zip([x0 * y0, x1 * y1, x0 * y1, x1 * y0]) {
                        *sum += product;
                    }
                }
            }
            assert!(f64::abs(mean) / (count / 6.0).sqrt() < 5.0, "mean {mean}");
            for product in &products[if same { 2 } else { 0 }..] {
                let z = product / (count / 144.0).sqrt();
                assert!(z.abs() < 5.0, "{z} at ({seed}, {epoch}, {index}, {step})");
            }
        }
    }
}
