//! The probabilities of bits, and of all values of some bits together; 0 where they are [`Real::TINY`] at most.

use super::real::{Real, Vector};

/// The probabilities that a bit is 0 and that it is 1, without cancellation: sigmoid(-slope x), sigmoid(slope x).
#[inline(always)]
pub(super) fn bit<T: Real>(x: T, slope: f64) -> [T; 2] {
    let a = slope * x.double();
    let factor = (-a.abs()).exp();
    let (rare, common) = (factor / (1.0 + factor), 1.0 / (1.0 + factor));
    let (zero, one) = if a > 0.0 { (rare, common) } else { (common, rare) };
    [T::round(zero).flushed(), T::round(one).flushed()]
}

/// table[c] = the probability of the bits of c, the first one most significant; [2^bits].
#[inline(always)]
pub(super) fn table_of_row<T: Real>(bits: &[[T; 2]], table: &mut [T]) {
    table[0] = T::ONE;
    let (mut length, mut i) = (1, bits.len());
    while i > 0 {
        i -= 1;
        let [zero, one] = bits[i];
        let (low, high) = table[..2 * length].split_at_mut(length);
        let mut c = 0;
        while c < length {
            high[c] = (low[c] * one).flushed();
            low[c] = (low[c] * zero).flushed();
            c += 1;
        }
        length *= 2;
    }
}

/// table[c][n] = the same of `panel` rows n side by side: `bits` is [bits, 2, panel] and the table [2^bits, panel].
#[inline(always)]
pub(super) fn table_of_rows<V: Vector>(bits: &[V::Scalar], panel: usize, table: &mut [V::Scalar]) {
    let count = bits.len() / (2 * panel);
    let mut at = 0;
    while at < panel {
        V::splat(V::Scalar::ONE).store(table, at);
        let (mut length, mut i) = (1, count);
        while i > 0 {
            i -= 1;
            let zero = V::load(bits, 2 * i * panel + at);
            let one = V::load(bits, (2 * i + 1) * panel + at);
            let mut c = 0;
            while c < length {
                let value = V::load(table, c * panel + at);
                value.mul(one).flushed().store(table, (length + c) * panel + at);
                value.mul(zero).flushed().store(table, c * panel + at);
                c += 1;
            }
            length *= 2;
        }
        at += V::COUNT;
    }
}
