//! The order of an epoch: position -> index, a pure function of (number of examples, seed, epoch).

use super::keys::{ORDER, Stream, epoch_key, mix};

/// Up to here the order is a table shuffled by Fisher and Yates; a Feistel network over few bits is not uniform.
const TABLE_LIMIT: usize = 1 << 16;
const ROUNDS: usize = 8;

/// A permutation of `0..len`.
#[derive(Debug, Clone)]
pub enum Order {
    /// Not shuffled.
    Identity,
    /// Shuffled, written out.
    Table(Vec<u32>),
    /// Shuffled, computed per position in constant memory.
    Network(Network),
}

impl Order {
    /// The order of `epoch` under `seed`.
    pub fn shuffled(len: usize, seed: u64, epoch: u64) -> Self {
        let key = epoch_key(ORDER, seed, epoch);
        if len > TABLE_LIMIT {
            return Self::Network(Network::new(len, key));
        }
        let mut stream = Stream::new(key);
        let mut table: Vec<u32> = (0..len as u32).collect();
        for last in (1..len).rev() {
            table.swap(last, stream.below(last as u32 + 1) as usize);
        }
        Self::Table(table)
    }

    /// The index of the example at `position`, which is below the length.
    pub fn index(&self, position: usize) -> usize {
        match self {
            Self::Identity => position,
            Self::Table(table) => table[position] as usize,
            Self::Network(network) => network.index(position as u64) as usize,
        }
    }
}

/// A Feistel network over the smallest power of two, walked until it lands below the length (fewer than two steps
/// on average). The halves have floor and ceil of half the bits and swap sizes each round.
#[derive(Debug, Clone)]
pub struct Network {
    len: u64,
    low_bits: u32,
    high_bits: u32,
    keys: [u64; ROUNDS],
}

impl Network {
    fn new(len: usize, key: u64) -> Self {
        let bits = (len.max(4) - 1).ilog2() + 1;
        let keys = std::array::from_fn(|round| mix(mix(key) ^ mix(round as u64)));
        Self { len: len as u64, low_bits: bits / 2, high_bits: bits - bits / 2, keys }
    }

    fn index(&self, position: u64) -> u64 {
        let mut value = position;
        loop {
            value = self.permute(value);
            if value < self.len {
                return value;
            }
        }
    }

    fn permute(&self, value: u64) -> u64 {
        let (low_mask, high_mask) = ((1u64 << self.low_bits) - 1, (1u64 << self.high_bits) - 1);
        let (mut high, mut low) = (value >> self.low_bits, value & low_mask);
        for pair in self.keys.chunks_exact(2) {
            high ^= scramble(low, pair[0]) & high_mask;
            low ^= scramble(high, pair[1]) & low_mask;
        }
        high << self.low_bits | low
    }
}

/// The round function; its upper bits, which depend on all of `value` and `key`.
fn scramble(value: u64, key: u64) -> u64 {
    let mut z = (value ^ key).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 29) ^ key.rotate_left(23)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn is_permutation(len: usize, index: impl Fn(usize) -> usize) -> bool {
        let mut seen = vec![false; len];
        (0..len).all(|position| !std::mem::replace(&mut seen[index(position)], true))
    }

    #[test]
    fn every_order_is_a_permutation() {
        for len in (0..70).chain([1000, 60_000, 65_535, 65_536, 65_537, 131_072, 131_073, 300_000]) {
            let order = Order::shuffled(len, 0, 0);
            assert_eq!(matches!(order, Order::Network(_)), len > TABLE_LIMIT);
            assert!(is_permutation(len, |position| order.index(position)), "{len}");
        }
        for len in 1..600 {
            let network = Network::new(len, 5);
            assert!(is_permutation(len, |position| network.index(position as u64) as usize), "{len}");
        }
    }

    #[test]
    fn large_orders_stay_in_range() {
        for len in [1usize << 31, (1 << 33) + 1, 3_000_000_019] {
            let order = Order::shuffled(len, 1, 2);
            let indices: HashSet<usize> = (0..2000).map(|position| order.index(position)).collect();
            assert_eq!(indices.len(), 2000);
            assert!(indices.iter().all(|&index| index < len) && indices.iter().any(|&index| index > len / 2));
        }
    }

    #[test]
    fn seed_and_epoch_each_change_the_order() {
        for len in [1000, 100_000] {
            let take = |seed, epoch| -> Vec<usize> {
                let order = Order::shuffled(len, seed, epoch);
                (0..100).map(|position| order.index(position)).collect()
            };
            assert_eq!(take(3, 4), take(3, 4));
            let all: HashSet<Vec<usize>> =
                (0..6).flat_map(|a| (0..6).map(move |b| (a, b))).map(|(a, b)| take(a, b)).collect();
            assert_eq!(all.len(), 36);
        }
    }

    /// Position x value is uniform: chi-square over many seeds, (n-1)^2 degrees of freedom.
    fn position_value(n: usize, trials: u64, index: impl Fn(u64) -> Box<dyn Fn(usize) -> usize>) -> f64 {
        let mut counts = vec![0u32; n * n];
        for trial in 0..trials {
            let order = index(trial);
            for position in 0..n {
                counts[position * n + order(position)] += 1;
            }
        }
        let expected = trials as f64 / n as f64;
        let chi2: f64 = counts.iter().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
        let freedom = ((n - 1) * (n - 1)) as f64;
        (chi2 - freedom) / (2.0 * freedom).sqrt()
    }

    #[test]
    fn small_orders_are_uniform() {
        for n in [2, 3, 5, 10, 40] {
            let z = position_value(n, 20_000, |trial| {
                let order = Order::shuffled(n, trial / 100, trial % 100);
                Box::new(move |position| order.index(position))
            });
            assert!(z.abs() < 5.0, "n {n}: {z}");
        }
    }

    #[test]
    fn all_orders_of_four_are_equally_likely() {
        let mut counts = std::collections::HashMap::new();
        for trial in 0..24_000 {
            let order = Order::shuffled(4, 0, trial);
            *counts.entry(std::array::from_fn::<usize, 4, _>(|position| order.index(position))).or_insert(0u32) += 1;
        }
        let chi2: f64 = counts.values().map(|&c| (f64::from(c) - 1000.0).powi(2) / 1000.0).sum();
        assert_eq!(counts.len(), 24);
        assert!(chi2 < 60.0, "chi2 {chi2} of 23 degrees of freedom"); // p = 4e-5
    }

    /// A uniform permutation has one fixed point and (n-1)/n successor pairs on average, each nearly Poisson, and
    /// buckets of positions and values are independent.
    #[test]
    fn the_network_looks_uniform() {
        let (n, trials) = (1000usize, 2000u64);
        let (mut fixed, mut successors) = (0u32, 0u32);
        for trial in 0..trials {
            let network = Network::new(n, epoch_key(ORDER, trial, 0));
            let order: Vec<u64> = (0..n as u64).map(|position| network.index(position)).collect();
            fixed += order.iter().enumerate().filter(|&(position, &value)| position as u64 == value).count() as u32;
            successors += order.windows(2).filter(|pair| pair[1] == pair[0] + 1).count() as u32;
        }
        for count in [fixed, successors] {
            let z = (f64::from(count) - trials as f64) / (trials as f64).sqrt();
            assert!(z.abs() < 5.0, "{z}");
        }
        let z = position_value(100, 20_000, |trial| {
            let network = Network::new(100, epoch_key(ORDER, 1, trial));
            Box::new(move |position| network.index(position as u64) as usize)
        });
        assert!(z.abs() < 6.0, "{z}");
    }

    #[test]
    fn no_pattern_in_a_large_order() {
        let n = 100_000usize;
        let order = Order::shuffled(n, 0, 0);
        let mut cells = [0u32; 400]; // 20 x 20 of position and value
        for position in 0..n {
            cells[position * 20 / n * 20 + order.index(position) * 20 / n] += 1;
        }
        let chi2: f64 = cells.iter().map(|&c| (f64::from(c) - 250.0).powi(2) / 250.0).sum();
        assert!((chi2 - 361.0).abs() < 5.0 * (2.0f64 * 361.0).sqrt(), "chi2 {chi2} of 361 degrees of freedom");
    }
}
